"""The seam in TransformerBridge: attention that TransformerLens computes itself, and attention left to transformers.

Two kinds of attention component are served:

- *reconstructed*: TransformerLens' own forward makes scores, pattern and output (Llama, Gemma, GPT-2, GPT-NeoX …). Keys
  and values come out of `_update_kv_cache` as LazyHeads, so that their product with the queries is a LazyScores.
- *delegated*: transformers' attention module runs (OPT …). It is reached through transformers' AttentionInterface; see
  `stream_lens.backend.delegated`. Unlike in dense TransformerLens, edits of hook_pattern take effect there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stream_lens.backend.architectures import TESTED, attention_kind
from stream_lens.backend.layer import StreamedLayer, refuse_backward_hooks
from stream_lens.backend.lazy_mask import LazyMask
from stream_lens.backend.lazy_scores import LazyHeads, LazyScores, softmax
from stream_lens.backend.refusal import refuse


def architecture(model: Any) -> str:
    """transformers' name of the model's class, such as "LlamaForCausalLM"."""
    return type(model.original_model).__name__


def attention_modules(model: Any, allow_untested: bool) -> list[tuple[int, str, Any]]:
    """Layer number, name and attention component of every layer that has one; refuses what cannot be streamed."""
    if getattr(model, "original_model", None) is None:
        raise refuse(model, "it is a bridge without a model in this process")
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise refuse(model, "it has no blocks of attention and MLP layers")
    found = []
    for number, block in enumerate(blocks):
        attn = getattr(block, "attn", None)
        if hasattr(block, "cross_attn"):
            raise refuse(model, "it has cross-attention")
        if attn is None:
            continue
        kind = attention_kind(attn)
        if kind.reason is not None:
            raise refuse(model, kind.reason)
        found.append((number, f"blocks.{number}.attn", attn))
    if not found:
        raise refuse(model, "none of its blocks has an attention that stream_lens knows")
    if architecture(model) not in TESTED and not allow_untested:
        raise refuse(
            model,
            f"{architecture(model)} is untested with stream_lens; pass allow_untested=True to try it, and compare "
            "logits at a k of all blocks with the dense ones first",
        )
    return found


def overrides(attn: Any) -> dict[str, Callable[..., Any]]:
    """The methods that make an attention component sparse."""
    if attention_kind(attn).delegated:
        return {}
    methods: dict[str, Callable[..., Any]] = {"_apply_reconstruct_attention_mask": _apply_mask}
    # The dense run's own methods are called inside, so take them from the class as it is now.
    methods["_update_kv_cache"] = _lazy_heads_of(type(attn)._update_kv_cache)
    if hasattr(type(attn), "_masked_softmax"):  # TransformerLens 4
        methods["_masked_softmax"] = _masked_softmax
    if hasattr(type(attn), "_process_output"):
        methods["_process_output"] = _output_without_pattern(type(attn)._process_output)
    return methods


def dense_overrides(attn: Any) -> dict[str, Callable[..., Any]]:
    """The methods that let a layer that stays dense read the masks of a streamed model."""
    if attention_kind(attn).delegated:
        return {}
    return {
        "_apply_reconstruct_attention_mask": _dense_mask_of(type(attn)._apply_reconstruct_attention_mask),
        "_update_kv_cache": _with_past_of(type(attn)._update_kv_cache),
    }


def _layer(attn: Any) -> StreamedLayer:
    return attn.__dict__["_streamed_layer"]


def _lazy_heads_of(update: Callable[..., Any]) -> Callable[..., Any]:
    def _update_kv_cache(self: Any, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        refuse_backward_hooks(_layer(self), self)
        k, v = update(self, k, v, **_with_past(kwargs))
        return LazyHeads(k, _layer(self)), LazyHeads(v, _layer(self))

    return _update_kv_cache


def _with_past_of(update: Callable[..., Any]) -> Callable[..., Any]:
    def _update_kv_cache(self: Any, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return update(self, k, v, **_with_past(kwargs))

    return _update_kv_cache


def _with_past(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The KV cache under the name that TransformerLens looks for.

    transformers 5.24 hands it down as `cache`. TransformerLens up to 4.3 does not know that name: its dense bridges
    then generate as if there were no prompt.
    """
    if kwargs.get("cache") is None or kwargs.get("past_key_values") is not None:
        return kwargs
    return {**kwargs, "past_key_values": kwargs["cache"]}


def _apply_mask(
    self: Any, attn_scores: LazyScores, attention_mask: Any, seq_len: int, q_seq_len: int | None = None
) -> LazyScores:
    offset, window, key_mask = seq_len - (q_seq_len or seq_len), None, None
    if isinstance(attention_mask, LazyMask):
        offset, window, key_mask = attention_mask.offset, attention_mask.window, attention_mask.key_mask
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        key_mask = attention_mask.bool()
    elif attention_mask is not None:
        raise NotImplementedError(
            f"{_layer(self).name}: an attention mask of shape {list(getattr(attention_mask, 'shape', []))} was given; "
            "a streamed model takes the [batch, position] mask of padding only, and makes no T × T mask."
        )
    return LazyScores(replace(attn_scores.steps, offset=offset, window=window, key_mask=key_mask))


def _masked_softmax(self: Any, attn_scores: Tensor, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(attn_scores, LazyScores):
        raise _layer(self).score_edit_error()
    return softmax(attn_scores, dtype=dtype)


def _output_without_pattern(process: Callable[..., Any]) -> Callable[..., Any]:
    def _process_output(self: Any, output: Any) -> Any:
        output = process(self, output)
        self.__dict__["_pattern"] = None  # the component would keep the last pattern, with its queries and keys
        return output

    return _process_output


def _dense_mask_of(apply: Callable[..., Any]) -> Callable[..., Any]:
    def _apply_reconstruct_attention_mask(self: Any, attn_scores: Tensor, attention_mask: Any, **sizes: Any) -> Tensor:
        if isinstance(attention_mask, LazyMask):
            attention_mask = attention_mask.dense(self.__dict__["_dense_implementation"])
        return apply(self, attn_scores=attn_scores, attention_mask=attention_mask, **sizes)

    return _apply_reconstruct_attention_mask

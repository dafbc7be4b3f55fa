"""The seam in HookedTransformer (TransformerLens 3.x): three methods of its attention; the rest stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from einops import rearrange
from torch import Tensor

from stream_lens.backend.layer import StreamedLayer, attend, refuse_backward_hooks
from stream_lens.backend.lazy_scores import LazyScores, Steps
from stream_lens.backend.refusal import refuse


def attention_modules(model: Any) -> list[tuple[int, str, Any]]:
    """Layer number, name and attention module of every layer; refuses models that a causal block mask cannot serve."""
    kind = model.cfg.positional_embedding_type
    if kind == "alibi":
        raise refuse(model, "ALiBi adds a bias to every score, which the block search does not know")
    if kind == "relative_positional_bias":
        raise refuse(model, "T5's relative position bias is a T × T tensor added to the scores")
    if model.cfg.attention_dir != "causal":
        raise refuse(model, "it is an encoder: its attention is not causal")
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise refuse(model, "it has no blocks of attention and MLP layers")
    found = [(number, f"blocks.{number}.attn", block.attn) for number, block in enumerate(blocks)]
    if any(hasattr(block, "cross_attn") for block in blocks):
        raise refuse(model, "it has cross-attention")
    return found


def overrides(attn: Any) -> dict[str, Callable[..., Any]]:
    """The methods that make an AbstractAttention module sparse."""
    return {
        "calculate_attention_scores": _calculate_attention_scores,
        "apply_causal_mask": _apply_causal_mask,
        "calculate_z_scores": _calculate_z_scores,
    }


def _layer(attn: Any) -> StreamedLayer:
    return attn.__dict__["_streamed_layer"]


def _calculate_attention_scores(self: Any, q: Tensor, k: Tensor) -> LazyScores:
    refuse_backward_hooks(_layer(self), self)
    steps = Steps(
        rearrange(q, "batch query head d_head -> batch head query d_head"),
        rearrange(k, "batch key head d_head -> batch head key d_head"),
        _layer(self),
        inner=1.0 / float(self.attn_scale),
    )
    cap = self.cfg.attn_scores_soft_cap
    if cap > 0:  # TransformerLens writes "no cap" as -1
        steps = replace(steps, inner=steps.inner / cap, outer=float(cap))
    return LazyScores(steps)


def _apply_causal_mask(
    self: Any, attn_scores: LazyScores, past_kv_pos_offset: int = 0, attention_mask: Tensor | None = None
) -> LazyScores:
    window = self.cfg.window_size if self.attn_type == "local" else None
    key_mask = None if attention_mask is None else attention_mask.bool()
    return LazyScores(replace(attn_scores.steps, offset=past_kv_pos_offset, window=window, key_mask=key_mask))


def _calculate_z_scores(self: Any, v: Tensor, pattern: Tensor) -> Tensor:
    values = rearrange(v, "batch key head d_head -> batch head key d_head")
    out = attend(_layer(self), pattern, values)
    return self.hook_z(rearrange(out, "batch head query d_head -> batch query head d_head"))

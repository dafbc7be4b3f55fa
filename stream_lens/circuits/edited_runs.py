"""Runs of a model with its patterns edited: what minimal k, attribution, pruning and ablation are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.backend.install import is_streamed, stream
from stream_lens.backend.long_inputs import last_logits_only
from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import BlockMask, StreamConfig

Edit = Callable[[SparsePattern], SparsePattern]


@contextmanager
def streamed_for_now(model: Any, config: StreamConfig | None) -> Iterator[None]:
    """The model streamed with `config`; one that is streamed already stays as it is, and then config must be None."""
    if not is_streamed(model):
        with stream(model, config):
            yield
        return
    if config is not None:
        raise ValueError("the model is streamed already, so config cannot take effect: leave it out.")
    yield


def streamed_layers(model: Any) -> list[int]:
    """Numbers of the layers of a streamed model that run sparse."""
    return [layer.number for layer in model.__dict__["_stream_session"].layers]


def run_edited(
    model: Any, tokens: Int[Tensor, "batch position"], edits: Mapping[int, Edit], last_logits: int
) -> Float[Tensor, "batch last_logits vocab"]:
    """Logits of the last positions of a streamed model's run in which layers' patterns go through `edits`."""
    with edited(model, edits), last_logits_only(model, last_logits):
        return forward(model, tokens)


@contextmanager
def edited(model: Any, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Layers' patterns go through `edits` in every run inside the block."""
    hooks = [(pattern_name(layer), _hook(edit)) for layer, edit in edits.items()]
    with model.hooks(fwd_hooks=hooks):
        yield


def forward(model: Any, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch last_logits vocab"]:
    """Logits, without a KV cache: a bridge would fill one that nobody reads."""
    is_bridge = hasattr(model, "original_model")
    return model(tokens, use_cache=False) if is_bridge else model(tokens)


def pattern_name(layer: int) -> str:
    """Name of a layer's hook_pattern."""
    return f"blocks.{layer}.attn.hook_pattern"


def _hook(edit: Edit) -> Callable[[Any, Any], Any]:
    def through(pattern: Any, hook: Any) -> Any:
        return edit(pattern)

    return through


@torch.no_grad()
def masks_of_run(
    model: Any, tokens: Int[Tensor, "batch position"], last_logits: int
) -> tuple[Float[Tensor, "batch last_logits vocab"], dict[int, BlockMask]]:
    """A streamed model's last logits and every streamed layer's mask; nothing else is kept."""
    masks: dict[int, BlockMask] = {}

    def note(layer: int) -> Edit:
        def read(pattern: SparsePattern) -> SparsePattern:
            masks[layer] = pattern.mask
            return pattern

        return read

    logits = run_edited(model, tokens, {layer: note(layer) for layer in streamed_layers(model)}, last_logits)
    return logits, masks


def repeated(mask: BlockMask, times: int) -> BlockMask:
    """The mask of the same texts, `times` over along the batch."""
    return replace(mask, indices=mask.indices.repeat(times, 1, 1, 1))

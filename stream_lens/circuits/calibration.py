"""Calibration: a few dense passes tell how much k each head needs, and one budget is shared out accordingly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stream_lens.backend import run_with_masks, stream
from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import BlockMask, StreamConfig
from stream_lens.blocks.calibration import allocate, recall_curve


def calibrate(
    model: Any,
    texts: Sequence[str | Int[Tensor, "batch position"]],
    budget: float,
    config: StreamConfig | None = None,
    *,
    most: int = 64,
    last_q_blocks: int | None = None,
) -> StreamConfig:
    """Give every (layer, head) the k that its attention needs, `budget` blocks a head on average.

    One dense pass a text (`observe`: O(T²) time, memory O(T · most)) measures how much attention the best blocks of
    each head hold; the blocks with the largest gains are bought first. Layers with a sliding window keep their own k
    (`config.k`), and the budget is shared among the layers without one.

    Args:
        model: HookedTransformer or TransformerBridge, not streamed.
        texts: a few texts like those to be traced, as long as those or nearly so. Not the test cases themselves.
        budget: mean k over the calibrated heads.
        config: everything but the overrides; its own overrides are kept where a head is not calibrated.
        most: the largest k that a head may get.
        last_q_blocks: count only so many last query blocks of each text; None counts all.

    Raises:
        ValueError: no text, a budget outside what is forced and `most`, or no streamed layer without a window.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one text like those to be traced.")
    config = config or StreamConfig()
    measuring = replace(config, k=most, overrides={})
    sums: dict[int, Tensor] = {}
    for text in texts:
        with stream(model, measuring, observe=True, keep_scores=False):
            _, cache = run_with_masks(model, text)
        for name, pattern in cache.items():
            if isinstance(pattern, SparsePattern) and pattern.mask.window is None:
                layer = int(name.split(".")[1])
                sums[layer] = sums.get(layer, 0) + _curve(pattern, config, most, last_q_blocks)
    if not sums:
        raise ValueError(
            "every streamed layer has a sliding window, so there is no k to share out: choose other layers."
        )
    curves = torch.cat([sums[layer] / len(texts) for layer in sorted(sums)])
    ks = allocate(curves, budget, config.forced_blocks).tolist()
    heads = len(ks) // len(sums)
    given = {(layer, head): ks[i * heads + head] for i, layer in enumerate(sorted(sums)) for head in range(heads)}
    return replace(config, overrides={**config.overrides, **given})


def _curve(
    pattern: SparsePattern, config: StreamConfig, most: int, last_q_blocks: int | None
) -> Float[Tensor, "head most"]:
    mask = pattern.mask
    q_blocks = mask.indices.shape[2]
    first = 0 if last_q_blocks is None else max(0, q_blocks - last_q_blocks)
    rows = torch.full((q_blocks,), mask.q_block)
    rows[-1] = mask.q_len - (q_blocks - 1) * mask.q_block
    share = pattern.block_mass / rows.to(pattern.block_mass)[:, None]
    return recall_curve(share[:, :, first:], _forced(mask, config)[:, :, first:], most)


def _forced(mask: BlockMask, config: StreamConfig) -> Bool[Tensor, "batch head q_blocks k"]:
    """Sinks, local and diagonal blocks of a mask without padding."""
    row = mask.offset + torch.arange(mask.indices.shape[2], device=mask.indices.device) * mask.q_block
    local = (row // mask.k_block - config.local_blocks)[:, None]
    return ((mask.indices < config.sink_blocks) | (mask.indices >= local)) & (mask.indices >= 0)

"""Which key blocks each query block can see at all, and which of those are kept whatever their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from stream_kernels.rule import ScoreRule
from torch import Tensor

from stream_lens.blocks.config import StreamConfig


@dataclass(frozen=True)
class BlockRanges:
    """Half-open ranges of key blocks, per batch row and query block.

    `[first, stop)` is visible to at least one row. Of it `[first, sink_stop)` are sinks and `[local_start, stop)` local
    and diagonal blocks: both are always kept. The search runs over the middle, `[sink_stop, local_start)`, where
    every block lies wholly before the query block: only windows and padding hide keys there.
    """

    first: Int[Tensor, "batch q_blocks"]
    sink_stop: Int[Tensor, "batch q_blocks"]
    local_start: Int[Tensor, "batch q_blocks"]
    stop: Int[Tensor, "batch q_blocks"]

    @property
    def visible(self) -> Int[Tensor, "batch q_blocks"]:
        return self.stop - self.first

    @property
    def forced(self) -> Int[Tensor, "batch q_blocks"]:
        return (self.sink_stop - self.first) + (self.stop - self.local_start)


def block_ranges(
    rule: ScoreRule, query_len: int, key_len: int, config: StreamConfig, *, batch: int, device: torch.device | str
) -> BlockRanges:
    """The ranges of every query block of a [batch, ·, query_len, ·] by [batch, ·, key_len, ·] attention."""
    q_blocks = -(-query_len // config.q_block)
    row_first = rule.offset + torch.arange(q_blocks, device=device) * config.q_block
    row_last = (row_first + config.q_block - 1).clamp(max=rule.offset + query_len - 1)
    stop = (row_last // config.k_block + 1).clamp(max=-(-key_len // config.k_block))[None]

    real_first = torch.zeros(batch, 1, dtype=torch.long, device=device)
    if rule.key_mask is not None:
        real_first = rule.key_mask.to(device).to(torch.uint8).argmax(-1, keepdim=True) // config.k_block
    window_first = torch.zeros_like(row_first)
    if rule.window is not None:
        window_first = (row_first - rule.window + 1).clamp(min=0) // config.k_block

    first = torch.minimum(torch.maximum(real_first, window_first[None]), stop)
    diagonal = row_first[None] // config.k_block
    local_start = torch.minimum(torch.maximum(diagonal - config.local_blocks, first), stop)
    sink_stop = torch.minimum(torch.maximum(real_first + config.sink_blocks, first), local_start)
    return BlockRanges(first, sink_stop, local_start, stop.expand(batch, -1))

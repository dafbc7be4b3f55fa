"""Which key blocks each query block can see at all, and which of those are kept whatever their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks.config import StreamConfig


@dataclass(frozen=True)
class BlockRanges:
    """Half-open ranges of key blocks, per batch row and query block.

    `[first, stop)` is visible to at least one row, unless padding lies between real keys: only what is padded before
    the first and after the last real key is left out. Of it `[first, sink_stop)` are sinks and `[local_start, stop)`
    local and diagonal blocks: both are always kept. The search runs over the middle, `[sink_stop, local_start)`, where
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
    first_key = torch.zeros(batch, 1, dtype=torch.long, device=device)
    seen_first, seen_last = first_key.expand(batch, q_blocks), row_last.expand(batch, q_blocks)
    if rule.key_mask is not None:
        first_key, last_key = _real_keys(rule.key_mask.to(device))
        seen_first, seen_last = torch.maximum(seen_first, first_key), torch.minimum(seen_last, last_key)
    if rule.window is not None:
        seen_first = torch.maximum(seen_first, row_first - rule.window + 1)

    sink_first = first_key // config.k_block
    stop = torch.where(seen_first <= seen_last, seen_last // config.k_block + 1, 0)
    first = torch.minimum(seen_first // config.k_block, stop)
    diagonal = row_first // config.k_block
    local_start = torch.minimum(torch.maximum(diagonal - config.local_blocks, first), stop)
    sink_stop = torch.minimum(torch.maximum(sink_first + config.sink_blocks, first), local_start)
    return BlockRanges(first, sink_stop, local_start, stop)


def _real_keys(key_mask: Bool[Tensor, "batch key"]) -> tuple[Int[Tensor, "batch 1"], Int[Tensor, "batch 1"]]:
    """Positions of the first and the last real key; the first is beyond all rows, and the last -1, where none is."""
    key = torch.arange(key_mask.shape[1], device=key_mask.device)
    first = torch.where(key_mask, key, key_mask.shape[1]).amin(-1, keepdim=True)
    return first, torch.where(key_mask, key, -1).amax(-1, keepdim=True)

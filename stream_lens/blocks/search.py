"""What every selector works with: one layer's queries and keys, the ranges of its blocks, and what may be kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks.block_mask import BlockMask, ascending
from stream_lens.blocks.branch_scores import KeyTables, QueryRows, block_logits, computing_dtype
from stream_lens.blocks.config import StreamConfig
from stream_lens.blocks.geometry import BlockRanges

CHUNK_BYTES = 4 << 20
"""Working set of the torch search and attention; larger chunks fall out of the cache and run slower."""


@dataclass(frozen=True)
class Search:
    """What a selector is given: one layer's queries and keys, and how much each query block may keep."""

    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"]
    rule: ScoreRule
    config: StreamConfig
    ranges: BlockRanges
    free: Int[Tensor, "batch head q_blocks"]
    """Blocks each query block may keep besides the forced ones."""
    slots: int
    """The most blocks that any query block keeps, forced ones included: the width of the mask."""
    free_slots: int
    """The most of them that are not forced, where there is anything to search."""
    rounds: int
    """Halvings after which every branch is a single block."""


Picker = Callable[[Search], Int[Tensor, "batch head q_blocks slots"]]
"""A selector: which blocks of the search range to keep, -1 in slots it leaves empty; at most `free` of them a row."""


def best(score: Float[Tensor, "*rows n"], keep: Int[Tensor, "*rows 1"]) -> Bool[Tensor, "*rows n"]:
    """True for the `keep` best scores of each row; ties go to the lower index, -inf is never kept."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(score.shape[-1], device=score.device) < keep
    survives = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, chosen.expand_as(order))
    return survives & (score > -torch.inf)


def in_chunks(
    search: Search, tables: KeyTables, keys_per_block: int, run: Callable[[slice], Tensor]
) -> Int[Tensor, "batch head q_blocks slots"]:
    """`run` over slices of query blocks whose gathered keys stay within `CHUNK_BYTES`, put together again."""
    batch, heads, _, d_head = search.q.shape
    q_blocks = search.free.shape[2]
    bytes_per_block = max(1, batch * heads * keys_per_block * d_head * tables.blocks.element_size())
    step = max(1, CHUNK_BYTES // bytes_per_block)
    return torch.cat([run(slice(i, min(i + step, q_blocks))) for i in range(0, q_blocks, step)], 2)


def query_rows(search: Search, q_blocks: slice, stride: int) -> QueryRows:
    """Every `stride`-th row of the query blocks."""
    q_block, rule = search.config.q_block, search.rule
    query_len, count = search.q.shape[2], q_blocks.stop - q_blocks.start
    q = search.q[:, :, q_blocks.start * q_block : q_blocks.stop * q_block].to(computing_dtype(search.q.dtype))
    if count * q_block > q.shape[2]:
        q = torch.nn.functional.pad(q, (0, 0, 0, count * q_block - q.shape[2]))
    index = torch.arange(0, q_block, stride, device=q.device)
    row = torch.arange(q_blocks.start, q_blocks.stop, device=q.device)[:, None] * q_block + index
    votes = None
    if rule.key_mask is not None:
        own = (rule.offset + row).clamp(max=rule.key_mask.shape[1] - 1)
        votes = (row < query_len) & rule.key_mask.to(q.device)[:, own]
    elif q_blocks.stop * q_block > query_len:
        votes = (row < query_len).expand(q.shape[0], -1, -1)
    q = rearrange(q, "b h (i r) d -> b h i r d", r=q_block)[:, :, :, ::stride]
    return QueryRows(q, rule.offset + row, votes)


def forced_logsumexp(
    search: Search, tables: KeyTables, rows: QueryRows, q_blocks: slice
) -> Float[Tensor, "batch head q_blocks rows"]:
    """Log of the exact mass that each row gives to the blocks that are kept anyway."""
    blocks = forced_blocks(search, q_blocks)
    blocks = repeat(blocks, "b i f -> b h i f", h=search.q.shape[1])
    return block_logits(rows, blocks, tables, search.rule).flatten(-2).logsumexp(-1)


def forced_blocks(search: Search, q_blocks: slice) -> Int[Tensor, "batch q_blocks forced"]:
    """Sink, local and diagonal blocks, -1 in slots that a row does not use."""
    ranges, config = search.ranges, search.config
    # A query block that starts inside a key block stands in one more of them.
    most = config.forced_blocks + (search.rule.offset % config.k_block != 0)
    j = torch.arange(most, device=ranges.first.device)
    sinks = ranges.first[:, q_blocks, None] + j[: config.sink_blocks]
    local = ranges.local_start[:, q_blocks, None] + j[: most - config.sink_blocks]
    sinks = torch.where(sinks < ranges.sink_stop[:, q_blocks, None], sinks, -1)
    return torch.cat([sinks, torch.where(local < ranges.stop[:, q_blocks, None], local, -1)], -1)


def assembled(search: Search, picked: Int[Tensor, "batch head q_blocks slots"]) -> BlockMask:
    """The mask of the picked blocks and the forced ones."""
    forced = forced_blocks(search, slice(0, search.free.shape[2]))
    forced = repeat(forced, "b i f -> b h i f", h=search.q.shape[1])
    indices = ascending(torch.cat([forced, picked], -1))
    return mask_of(search, indices[..., : search.slots].contiguous())


def mask_of(search: Search, indices: Int[Tensor, "batch head q_blocks slots"]) -> BlockMask:
    """Finished indices as a mask over the search's tokens."""
    config, rule = search.config, search.rule
    return BlockMask(
        indices,
        config.q_block,
        config.k_block,
        search.q.shape[2],
        search.k.shape[2],
        rule.offset,
        rule.window,
    )

"""The hierarchical search of Stream (arXiv 2510.19875), for one query block whose free budget is k':

1. Sink, local and diagonal blocks are kept outright and count inside k. The blocks between them are the search range.
2. Split the range into m equal branches (m = k', or `oversample` · k').
3. Halve every branch; score each child by its representative (`stream_lens.blocks.branch_scores`); keep the best m.
4. Repeat until every branch is one block: ceil(log2(range / m)) rounds, the same number for all rows, so shapes are
   fixed and nothing depends on data.
5. With `oversample` > 1, rank the m single blocks by exact scores and keep the best k'.

Ties go to the lower block. A range that fits the budget is kept whole, so a k of all blocks gives dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stream_lens.blocks.block_mask import ascending
from stream_lens.blocks.branch_scores import (
    KeyTables,
    block_logits,
    key_tables,
    reduce_rows,
    representative_logits,
)
from stream_lens.blocks.search import Search, best, forced_logsumexp, in_chunks, query_rows


@dataclass(frozen=True)
class SearchRound:
    """One round of the search, for teaching and debugging: the children that competed.

    `survives` marks the best m; the next round's branches are exactly those, in ascending order.
    """

    start: Int[Tensor, "batch head q_blocks children"]
    stop: Int[Tensor, "batch head q_blocks children"]
    score: Float[Tensor, "batch head q_blocks children"]
    survives: Bool[Tensor, "batch head q_blocks children"]


def hierarchical(search: Search, rounds: list[SearchRound] | None = None) -> Tensor:
    """The search above; appends every round's state to `rounds`, in one piece, when a list is given."""
    config = search.config
    pooled = config.representative if config.representative.startswith("mean") else ""
    tables = key_tables(search.k, search.rule, config.k_block, pooled)
    branches = max(1, config.oversample * search.free_slots)
    keys_scored = branches * (6 if pooled else 2 * config.k_block)  # three prefix sums of float64, or two blocks
    if rounds is not None:
        keys_scored = 0
    blocks = in_chunks(search, tables, keys_scored, lambda chunk: _searched(search, tables, rounds, branches, chunk))
    if config.oversample == 1:
        return blocks
    return in_chunks(search, tables, branches * config.k_block, lambda chunk: _ranked(search, tables, blocks, chunk))


def _searched(
    search: Search, tables: KeyTables, rounds: list[SearchRound] | None, slots: int, q_blocks: slice
) -> Int[Tensor, "batch head q_blocks branches"]:
    """The single blocks that the rounds end with, ascending; -1 in empty slots."""
    config, rule = search.config, search.rule
    rows = query_rows(search, q_blocks, config.query_stride)
    lower = search.ranges.sink_stop[:, None, q_blocks, None]
    length = search.ranges.local_start[:, None, q_blocks, None] - lower
    free = search.free[:, :, q_blocks, None]
    branches = torch.where(length <= free, length, torch.minimum(length, config.oversample * free))
    start, stop = _equal_branches(lower, length, branches, slots)
    forced = None
    if config.reduce != "max" and search.rounds:
        forced = forced_logsumexp(search, tables, rows, q_blocks)
    for _ in range(search.rounds):
        middle = torch.where(stop - start <= 1, stop, (start + stop) // 2)
        edges = torch.stack([start, middle, stop], -1)
        child_start, child_stop = edges[..., :2].flatten(-2), edges[..., 1:].flatten(-2)
        logits = representative_logits(rows, edges, tables, rule, config.representative, config.reduce)
        score = reduce_rows(logits, rows, config.reduce, forced)
        score = score.masked_fill(child_stop <= child_start, -torch.inf)
        survives = best(score, branches)
        if rounds is not None:
            rounds.append(SearchRound(child_start, child_stop, score, survives))
        start, stop = _compacted(child_start, child_stop, survives, slots)
    return torch.where(stop > start, start, -1)


def _equal_branches(lower: Tensor, length: Tensor, branches: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    j = torch.arange(slots, device=lower.device)
    used = j < branches
    start = lower + length * j // branches.clamp(min=1)
    stop = lower + length * (j + 1) // branches.clamp(min=1)
    return torch.where(used, start, 0), torch.where(used, stop, 0)


def _compacted(start: Tensor, stop: Tensor, survives: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    order = survives.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    kept = survives.gather(-1, order)
    return torch.where(kept, start.gather(-1, order), 0), torch.where(kept, stop.gather(-1, order), 0)


def _ranked(
    search: Search, tables: KeyTables, candidates: Int[Tensor, "batch head q_blocks branches"], q_blocks: slice
) -> Int[Tensor, "batch head q_blocks slots"]:
    """Of single candidate blocks, the `free` best by the exact scores of all their keys."""
    config = search.config
    blocks = candidates[:, :, q_blocks]
    rows = query_rows(search, q_blocks, config.query_stride)
    logits = block_logits(rows, blocks, tables, search.rule, past=True)
    logits = logits.amax(-1) if config.rank == "max" else logits.logsumexp(-1)
    forced = forced_logsumexp(search, tables, rows, q_blocks) if config.rank != "max" else None
    score = reduce_rows(logits, rows, config.rank, forced).masked_fill(blocks < 0, -torch.inf)
    # A range within the budget is kept whole, also by rows that do not vote (padding).
    free = search.free[:, :, q_blocks, None]
    fits = (search.ranges.local_start - search.ranges.sink_stop)[:, None, q_blocks, None] <= free
    survives = torch.where(fits, blocks >= 0, best(score, free))
    return ascending(torch.where(survives, blocks, -1))[..., : search.slots]

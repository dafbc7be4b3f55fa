"""Selectors to compare the search with at the same budget: the oracle, and two that do not look at q or k."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from stream_lens.blocks.branch_scores import block_logits, key_tables, reduce_rows
from stream_lens.blocks.search import Search, best, forced_logsumexp, in_chunks, query_rows


def exhaustive(search: Search) -> Int[Tensor, "batch head q_blocks slots"]:
    """The oracle: every block of the range scored by all its keys and rows, ranked by `config.rank`; O(T²) time."""
    config = search.config
    tables = key_tables(search.k, search.rule, config.k_block, "")

    def chunk(q_blocks: slice) -> Tensor:
        rows = query_rows(search, q_blocks, 1)
        lower = search.ranges.sink_stop[:, None, q_blocks, None]
        upper = search.ranges.local_start[:, None, q_blocks, None]
        block = torch.arange(tables.k_blocks, device=lower.device)
        blocks = torch.where((block >= lower) & (block < upper), block, -1)
        blocks = blocks.expand(-1, search.q.shape[1], -1, -1)
        logits = block_logits(rows, blocks, tables, search.rule)
        logits = logits.amax(-1) if config.rank == "max" else logits.logsumexp(-1)
        forced = None if config.rank == "max" else forced_logsumexp(search, tables, rows, q_blocks)
        score = reduce_rows(logits, rows, config.rank, forced).masked_fill(blocks < 0, -torch.inf)
        free = search.free[:, :, q_blocks, None]
        survives = torch.where(upper - lower <= free, blocks >= 0, best(score, free))
        return _packed(blocks, survives, search.slots)

    return in_chunks(search, tables, tables.k_blocks * config.k_block, chunk)


def window_sinks(search: Search) -> Int[Tensor, "batch head q_blocks slots"]:
    """The blocks nearest before the query block: with the sinks, the usual sliding-window baseline."""
    upper = search.ranges.local_start[:, None, :, None]
    lower = search.ranges.sink_stop[:, None, :, None]
    block = upper - 1 - torch.arange(search.slots, device=upper.device)
    keep = (block >= lower) & (torch.arange(search.slots, device=upper.device) < search.free[..., None])
    return torch.where(keep, block, -1)


def random(search: Search) -> Int[Tensor, "batch head q_blocks slots"]:
    """Blocks of the range drawn without replacement; `config.seed` and the shapes decide them."""
    lower = search.ranges.sink_stop[:, None, :, None]
    upper = search.ranges.local_start[:, None, :, None]
    k_blocks = -(-search.k.shape[2] // search.config.k_block)
    generator = torch.Generator().manual_seed(search.config.seed)
    block = torch.arange(k_blocks, device=lower.device)
    rows = []
    for i in range(search.free.shape[2]):  # one query block at a time: all at once would be heads × (T / block)²
        score = torch.rand(*search.free.shape[:2], 1, k_blocks, generator=generator).to(lower.device)
        inside = (block >= lower[:, :, i : i + 1]) & (block < upper[:, :, i : i + 1])
        survives = best(score.masked_fill(~inside, -torch.inf), search.free[:, :, i : i + 1, None])
        rows.append(_packed(block.expand_as(score), survives, search.slots))
    return torch.cat(rows, 2)


def _packed(blocks: Tensor, survives: Tensor, slots: int) -> Tensor:
    """The surviving blocks of each row in its first slots, -1 in the rest."""
    order = survives.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    taken = torch.where(survives.gather(-1, order), blocks.gather(-1, order), -1)
    return torch.nn.functional.pad(taken, (0, slots - taken.shape[-1]), value=-1)

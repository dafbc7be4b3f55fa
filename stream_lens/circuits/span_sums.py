"""Attention between spans of tokens: probability summed over rows × keys, from block masses, scores or dense patterns.

Spans (sentences, a needle, blocks) need not end where blocks do. A kept block's mass then goes to the spans that share
it in one of two ways:

- *exact*: the block's probabilities are computed again from queries and keys, where the pattern holds them.
- *by overlap*: as if the mass lay evenly over the block's visible (row, key) pairs. It needs the masses only. The
  first block shows its limit: the mass of the sink at position 0 leaks into the first span.

All results are sparse entries: one for each pair of spans of which at least one visible token pair is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import BlockMask
from stream_lens.circuits.kept_probabilities import holds_scores, kept_probabilities
from stream_lens.circuits.pieces import Pieces, overlap_shares, pieces_of, visible_pairs
from stream_lens.circuits.runs import Pattern
from stream_lens.circuits.text_tokens import Span

_PIECES_AT_ONCE = 4 << 20  # entries of one step before they are summed by span: tens of MB


@dataclass(frozen=True, eq=False)
class SpanSums:
    """One layer's attention between spans, as entries sorted by head, query span, key span.

    Attributes:
        head, query, key: what each entry stands for, as counts from 0.
        mass: probability summed over the query span's rows and the key span's keys, the gate applied; the number of
            kept token pairs where only a mask was given.
        n_heads: heads of the layer.
        exact: whether no mass was shared out by overlap.
    """

    head: Int[np.ndarray, " entry"]
    query: Int[np.ndarray, " entry"]
    key: Int[np.ndarray, " entry"]
    mass: Float[np.ndarray, " entry"]
    n_heads: int
    exact: bool


def span_sums(
    pattern: Pattern,
    query_spans: tuple[Span, ...],
    key_spans: tuple[Span, ...],
    *,
    exact: bool | None = None,
    observe: bool = False,
) -> SpanSums:
    """Sum a pattern of a batch of 1 over pairs of spans.

    Args:
        pattern: sparse, dense, or a mask alone.
        query_spans, key_spans: ascending, disjoint [start, stop) in absolute token positions.
        exact: None computes from the scores where that changes anything and the pattern holds them.
        observe: whether the pattern's masses are shares of the dense pattern; exact sums are then, too.

    Raises:
        NoScoresError: exact=True and the pattern was cached without its queries and keys.
        TypeError: exact=True and only a mask was given.
    """
    if isinstance(pattern, SparsePattern):
        mask = pattern.mask
        queries, keys = _cut(mask, query_spans, key_spans)
        if exact is None:
            exact = holds_scores(pattern) and not (queries.whole_blocks and keys.whole_blocks)
        if exact:
            entries = _exact(pattern, queries, keys, of_dense=observe and not pattern.data_.edited)
            return _summed(entries, mask.shape[1], len(query_spans), len(key_spans), exact=True)
        mass = pattern.block_mass if pattern.data_.gate is None else pattern.block_mass * pattern.gate
        whole = queries.whole_blocks and keys.whole_blocks
        entries = _by_overlap(mask, mass[0], queries, keys)
        return _summed(entries, mask.shape[1], len(query_spans), len(key_spans), exact=whole)
    if isinstance(pattern, BlockMask):
        if exact:
            raise TypeError(
                "exact=True needs probabilities, and only a mask was given: give the cache or its patterns."
            )
        queries, keys = _cut(pattern, query_spans, key_spans)
        entries = _by_overlap(pattern, None, queries, keys)
        return _summed(entries, pattern.shape[1], len(query_spans), len(key_spans), exact=True)
    return _dense(pattern[0], query_spans, key_spans)


def _cut(mask: BlockMask, query_spans: tuple[Span, ...], key_spans: tuple[Span, ...]) -> tuple[Pieces, Pieces]:
    device = mask.indices.device
    return (
        pieces_of(query_spans, mask.q_block, mask.q_len, first=mask.offset, device=device),
        pieces_of(key_spans, mask.k_block, mask.kv_len, device=device),
    )


def _exact(pattern: SparsePattern, queries: Pieces, keys: Pieces, *, of_dense: bool) -> list[tuple[Tensor, ...]]:
    mask, entries = pattern.mask, []
    for first, probabilities in kept_probabilities(pattern, of_dense=of_dense):
        part = slice(first, first + probabilities.shape[1])
        index = mask.indices[0, :, part]
        members = keys.members(mask.k_block).to(probabilities.dtype)[index.clamp(min=0)]
        by_key = torch.einsum("h n r k j, h n k j m -> h n r k m", probabilities, members)
        rows = queries.members(mask.q_block)[part].to(probabilities.dtype)
        mass = torch.einsum("h n r k m, n r p -> h n p k m", by_key, rows)
        entries.append(_entries(mask, mass.double(), part, queries, keys))
    return entries


def _by_overlap(
    mask: BlockMask, mass: Float[Tensor, "head q_blocks k"] | None, queries: Pieces, keys: Pieces
) -> list[tuple[Tensor, ...]]:
    per_block = mask.shape[1] * mask.k * queries.span.shape[1] * keys.span.shape[1]
    step, entries = max(1, _PIECES_AT_ONCE // max(per_block, 1)), []
    for first in range(0, mask.q_blocks, step):
        part = slice(first, min(first + step, mask.q_blocks))
        share, pairs = overlap_shares(mask, part, queries, keys)
        shared = pairs.double() if mass is None else mass[:, part, None, :, None].double() * share
        entries.append(_entries(mask, shared, part, queries, keys))
    return entries


def _entries(
    mask: BlockMask, mass: Float[Tensor, "head part piece k key_piece"], part: slice, queries: Pieces, keys: Pieces
) -> tuple[Tensor, ...]:
    """(head, query span, key span, mass) of the pieces that are there and hold a visible token pair."""
    index = mask.indices[0, :, part]
    at = index.clamp(min=0)
    query_span, key_span = queries.span[part][None, :, :, None, None], keys.span[at][:, :, None]
    seen = visible_pairs(
        queries.start[part][None, :, :, None, None],
        queries.stop[part][None, :, :, None, None],
        keys.start[at][:, :, None],
        keys.stop[at][:, :, None],
        mask.window,
    )
    there = (index >= 0)[:, :, None, :, None] & (query_span >= 0) & (key_span >= 0) & (seen > 0)
    head = torch.arange(mask.shape[1], device=mass.device)[:, None, None, None, None]
    shape = there.shape
    return tuple(x.expand(shape)[there] for x in (head, query_span, key_span, mass))


def _dense(
    pattern: Float[Tensor, "head query key"], query_spans: tuple[Span, ...], key_spans: tuple[Span, ...]
) -> SpanSums:
    heads, rows, columns = pattern.shape
    query_of, key_of = (
        _owner(spans, size, pattern.device) for spans, size in ((query_spans, rows), (key_spans, columns))
    )
    edges = [torch.tensor(spans, device=pattern.device).view(-1, 2) for spans in (query_spans, key_spans)]
    filled = [side[:, 0] < side[:, 1] for side in edges]
    seen = (edges[1][:, 0] < edges[0][:, 1:]) & filled[0][:, None] & filled[1]
    query, key = seen.nonzero(as_tuple=True)
    entries: list[tuple[Tensor, ...]] = []
    for head in range(heads):  # one at a time: the copy in float64 is the size of a dense pattern
        by_key = torch.zeros(rows, len(key_spans) + 1, dtype=torch.float64, device=pattern.device)
        by_key.index_add_(1, key_of, pattern[head].double())
        sums = torch.zeros(len(query_spans) + 1, len(key_spans) + 1, dtype=torch.float64, device=pattern.device)
        sums.index_add_(0, query_of, by_key)
        entries.append((torch.full_like(query, head), query, key, sums[query, key]))
    return _summed(entries, heads, len(query_spans), len(key_spans), exact=True)


def _owner(spans: tuple[Span, ...], size: int, device: torch.device) -> Int[Tensor, "token"]:
    """The span of every token; their number for tokens in none."""
    owner = torch.full((size,), len(spans), device=device)
    for number, (start, stop) in enumerate(spans):
        owner[start:stop] = number
    return owner


def _summed(entries: list[tuple[Tensor, ...]], heads: int, queries: int, keys: int, *, exact: bool) -> SpanSums:
    """Entries of the same head and spans added up, and sorted."""
    parts = []
    for head, query, key, mass in entries:
        number = (head.long() * queries + query) * keys + key
        parts.append(_added(number.cpu().numpy(), mass.cpu().numpy()))
    numbers, masses = _added(*(np.concatenate([part[side] for part in parts]) for side in (0, 1)))
    pair, key_number = np.divmod(numbers, max(keys, 1))
    head_number, query_number = np.divmod(pair, max(queries, 1))
    return SpanSums(head_number, query_number, key_number, masses, heads, exact)


def _added(number: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, place = np.unique(number, return_inverse=True)
    return found, np.bincount(place, weights=mass, minlength=len(found))

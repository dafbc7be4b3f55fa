"""Pieces: where spans of tokens and blocks of tokens cut each other, and how many token pairs causality leaves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stream_lens.blocks import BlockMask
from stream_lens.circuits.text_tokens import Span


@dataclass(frozen=True, eq=False)
class Pieces:
    """Every block's pieces, one for each span that has tokens in it; -1 and empty where a block has fewer.

    Attributes:
        span: which span the piece belongs to.
        start, stop: the piece's tokens, in absolute positions.
        block_start, block_stop: the block's.
        whole_blocks: whether no block is cut: each lies in one span, or in none.
    """

    span: Int[Tensor, "block piece"]
    start: Int[Tensor, "block piece"]
    stop: Int[Tensor, "block piece"]
    block_start: Int[Tensor, "block"]
    block_stop: Int[Tensor, "block"]

    @property
    def whole_blocks(self) -> bool:
        size = self.stop - self.start
        return bool(((size == 0) | (size == (self.block_stop - self.block_start)[:, None])).all())

    def members(self, size: int) -> Bool[Tensor, "block token piece"]:
        """Whether each of a block's tokens (of `size`, the last block padded) lies in each piece."""
        token = (self.block_start[:, None] + torch.arange(size, device=self.start.device))[..., None]
        return (token >= self.start[:, None]) & (token < self.stop[:, None])


def pieces_of(
    spans: tuple[Span, ...], size: int, count: int, *, first: int = 0, device: torch.device | str = "cpu"
) -> Pieces:
    """Cut tokens [first, first + count), in blocks of `size`, at the edges of ascending, disjoint spans."""
    edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
    blocks = -(-count // size)
    last = first + count
    cuts = np.unique(np.concatenate([edges.ravel().clip(first, last), np.arange(first, last, size), [last]]))
    starts, stops = cuts[:-1], cuts[1:]
    filled = np.flatnonzero(edges[:, 0] < edges[:, 1])
    owner = np.searchsorted(edges[filled, 0], starts, side="right") - 1
    inside = owner >= 0
    inside[inside] = starts[inside] < edges[filled[owner[inside]], 1]
    starts, stops, owner = starts[inside], stops[inside], filled[owner[inside]]
    block = (starts - first) // size
    place = np.arange(len(block)) - np.searchsorted(block, block, side="left")
    tables = np.zeros((3, blocks, int(place.max(initial=0)) + 1), dtype=np.int64)
    tables[0] = -1
    for table, values in zip(tables, (owner, starts, stops), strict=True):
        table[block, place] = values
    block_start = first + np.arange(blocks) * size
    ready = (*tables, block_start, np.minimum(block_start + size, last))
    return Pieces(*(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in ready))


def overlap_shares(
    mask: BlockMask, part: slice, queries: Pieces, keys: Pieces
) -> tuple[Float[Tensor, "head part piece k key_piece"], Int[Tensor, "head part piece k key_piece"]]:
    """Of each kept block, the share of its visible token pairs that lies in each pair of pieces, and their number."""
    at = mask.indices[0, :, part].clamp(min=0)
    rows = (queries.start[part][None, :, :, None, None], queries.stop[part][None, :, :, None, None])
    pairs = visible_pairs(*rows, keys.start[at][:, :, None], keys.stop[at][:, :, None], mask.window)
    of_block = visible_pairs(
        queries.block_start[part][None, :, None],
        queries.block_stop[part][None, :, None],
        keys.block_start[at],
        keys.block_stop[at],
        mask.window,
    )
    return pairs / of_block.clamp(min=1)[:, :, None, :, None], pairs


def visible_pairs(row: Tensor, row_stop: Tensor, key: Tensor, key_stop: Tensor, window: int | None) -> Tensor:
    """How many (row, key) pairs of [row, row_stop) × [key, key_stop) causality and the window allow."""

    def triangle(n: Tensor) -> Tensor:
        n = n.clamp(min=0)
        return n * (n + 1) // 2

    def not_after(key: Tensor, key_stop: Tensor) -> Tensor:
        below = triangle(row_stop - key) - triangle(row - key)
        return below - (triangle(row_stop - key_stop) - triangle(row - key_stop))

    seen = not_after(key, key_stop)
    return seen if window is None else seen - not_after(key + window, key_stop + window)

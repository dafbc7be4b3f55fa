"""Which cells (layer, head, query, key) each run keeps, and all runs' cells over one common list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stream_lens.blocks import BlockMask
from stream_lens.circuits.nodes import Nodes, block_nodes, segment_nodes
from stream_lens.circuits.runs import Pattern, Run, Source, runs_of
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.span_sums import span_sums
from stream_lens.circuits.vertical_scores import with_segments

Kept = tuple[np.ndarray, np.ndarray, int]
"""One run over the common list: whether it keeps each cell, the cell's share, and how many queries the run has."""


@dataclass(frozen=True, eq=False)
class RunCells:
    """What one run keeps.

    Attributes:
        number: ascending, each cell as one number (layer, head, query, key in `shape`).
        share: of a query row's attention, mean over the query's rows; NaN where only masks were given.
        shape: layers, heads, queries, keys.
        layers: the number of each layer.
        geometry: what runs must share to be compared.
        rows: queries that hold a token.
        about: model, T, k and pruned share, for titles.
    """

    number: Int[np.ndarray, " cell"]
    share: Float[np.ndarray, " cell"]
    shape: tuple[int, int, int, int]
    layers: tuple[int, ...]
    query_labels: tuple[str, ...]
    key_labels: tuple[str, ...]
    geometry: str
    rows: int
    about: str


@dataclass(frozen=True, eq=False)
class Cells:
    """All runs over the list of cells that any of them keeps."""

    number: Int[np.ndarray, " cell"]
    kept: Bool[np.ndarray, "run cell"]
    share: Float[np.ndarray, "run cell"]
    rows: tuple[int, ...]
    shape: tuple[int, int, int, int]
    layers: tuple[int, ...]
    weighted: bool

    def row(self, run: int) -> Kept:
        return self.kept[run], self.share[run], self.rows[run]

    def places(self) -> tuple[np.ndarray, ...]:
        """Layer, head, query and key of every cell."""
        layer, head, query, key = np.unravel_index(self.number, self.shape)
        return np.array(self.layers)[layer], head, query, key

    def head_number(self) -> tuple[np.ndarray, int]:
        """Which head of which layer each cell is in, counted through; and how many there are."""
        return self.number // (self.shape[2] * self.shape[3]), self.shape[0] * self.shape[1]


def kept_in_runs(source: Source | Iterable[Source], segments: Segments | Sequence[Segments] | None) -> list[RunCells]:
    """Every run's cells, by block or, with segments, by segment."""
    if segments is None:
        return [_by_block(run) for run in runs_of(source)]
    found = []
    for run, own in with_segments(source, segments):
        nodes = segment_nodes(own)
        found.append(_cells(run, nodes, nodes, "segments " + ", ".join(nodes.labels)))
    return found


def aligned_cells(runs: Sequence[RunCells]) -> Cells:
    """The runs over one list of cells. `ValueError` if they are not of the same layers, heads and nodes."""
    first = runs[0]
    for run in runs[1:]:
        if (run.layers, run.shape[1]) != (first.layers, first.shape[1]):
            raise ValueError(
                f"the runs have layers {list(first.layers)} of {first.shape[1]} heads and {list(run.layers)} of "
                f"{run.shape[1]}: give runs of one model with the same layers cached."
            )
        if run.geometry != first.geometry:
            raise ValueError(
                f"the runs do not align: one has {first.geometry}, another {run.geometry}. Give segments (and "
                "failure_segments) with the same labels for runs of different lengths."
            )
    number = np.unique(np.concatenate([run.number for run in runs]))
    kept = np.zeros((len(runs), len(number)), dtype=bool)
    share = np.zeros((len(runs), len(number)), dtype=np.float32)
    weighted = not any(np.isnan(run.share).any() for run in runs)
    for at, run in enumerate(runs):
        place = np.searchsorted(number, run.number)
        kept[at, place] = True
        share[at, place] = run.share
    if not weighted:
        share[:] = np.nan
    return Cells(number, kept, share, tuple(run.rows for run in runs), first.shape, first.layers, weighted)


def _by_block(run: Run) -> RunCells:
    masks = [_mask(pattern) for pattern in run.layers.values()]
    sizes = {(mask.q_len, mask.kv_len, mask.q_block, mask.k_block, mask.offset) for mask in masks}
    if len(sizes) > 1:
        raise ValueError("the layers have blocks of different sizes: give segments to compare by.")
    q_len, kv_len, q_block, k_block, offset = sizes.pop()
    queries, keys = block_nodes(q_len, q_block, offset), block_nodes(kv_len, k_block)
    return _cells(run, queries, keys, f"{q_len} × {kv_len} tokens from {offset} in blocks of {q_block} × {k_block}")


def _mask(pattern: Pattern) -> BlockMask:
    if isinstance(pattern, BlockMask):
        return pattern
    mask = getattr(pattern, "mask", None)
    if not isinstance(mask, BlockMask):
        raise TypeError("a dense pattern has no blocks: give segments to compare by, or stream the model.")
    return mask


def _cells(run: Run, queries: Nodes, keys: Nodes, geometry: str) -> RunCells:
    size = np.array([stop - start for start, stop in queries.spans], dtype=float)
    heads = {pattern.shape[1] for pattern in run.layers.values()}
    if len(heads) > 1:
        raise ValueError(f"the layers have {sorted(heads)} heads: compare layers of as many heads.")
    shape = (len(run.layers), heads.pop(), len(queries), len(keys))
    numbers, shares = [], []
    for at, pattern in enumerate(run.layers.values()):
        sums = span_sums(pattern, queries.spans, keys.spans, observe=run.observe)
        there = np.ones(len(sums.mass), dtype=bool)
        if isinstance(pattern, Tensor) and not hasattr(pattern, "mask"):
            there = sums.mass > 0  # a dense pattern has an entry for every pair
        place = (np.full(int(there.sum()), at), sums.head[there], sums.query[there], sums.key[there])
        numbers.append(np.ravel_multi_index(place, shape))
        mass = np.full(len(place[0]), np.nan) if isinstance(pattern, BlockMask) else sums.mass[there]
        shares.append(mass / size[place[2]])
    rows = int((size > 0).sum())
    return RunCells(
        np.concatenate(numbers),
        np.concatenate(shares),
        shape,
        tuple(run.layers),
        queries.labels,
        keys.labels,
        geometry,
        rows,
        run.about,
    )

"""Mask diff: what a successful run attends to and a failed one does not, for every layer and head.

Runs of one length are compared block by block; runs of different lengths by the segments that both have. With several
pairs come means, a paired test over pairs, and a control: the same figures for random pairs of the *same* group, which
show how much two runs differ when nothing sets them apart but the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stream_lens.circuits.results import json_of
from stream_lens.circuits.run_cells import Cells, Kept, aligned_cells, kept_in_runs
from stream_lens.circuits.runs import Source
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.significance import Test, check_test, corrected, paired_p_values

_FIGURES = ("added", "removed", "kept", "moved")


@dataclass(frozen=True, eq=False)
class MaskDiff:
    """Success − failure. A *cell* is a query and a key (blocks, or segments) in one head of one layer.

    Attributes:
        cells: one row a cell that some run keeps: layer, head, query, key; added, removed, kept (shares of pairs in
            which success alone, failure alone, both keep it); success, failure (mean share of a query row's attention,
            NaN where only masks were given) and their difference (of how often it is kept, without masses);
            p_value and q_value over pairs (NaN with one pair).
        heads: one row a head: added, removed, kept (cells, mean over pairs), moved (attention that went elsewhere:
            half the sum of |success − failure|, mean over query rows of a pair; 0 to 1), and each as control_… for
            random pairs of one group (NaN where a group has one run).
        query_labels, key_labels: names of what `query` and `key` count.
        by: "block" or "segment".
        pairs, control_pairs: how many stand behind the figures.
        test: of the p values.
        about: model, T, k and pruned share of the first successful run, for titles; empty where that is not known.
    """

    cells: pd.DataFrame
    heads: pd.DataFrame
    query_labels: tuple[str, ...]
    key_labels: tuple[str, ...]
    by: str
    pairs: int
    control_pairs: int
    test: str
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """`cells` with query_label and key_label, the largest differences first."""
        frame = self.cells.copy()
        frame.insert(4, "query_label", np.array(self.query_labels, dtype=object)[frame["query"]])
        frame.insert(5, "key_label", np.array(self.key_labels, dtype=object)[frame["key"]])
        order = np.argsort(-frame["difference"].abs().to_numpy(), kind="stable")
        return frame.iloc[order].reset_index(drop=True)

    def by_layer(self) -> pd.DataFrame:
        """One row a layer: cells summed over heads, `moved` averaged, and jaccard = kept ÷ (added + removed + kept)."""
        grouped = self.heads.groupby("layer")
        counts = [name for name in self.heads.columns[2:] if name.removeprefix("control_") != "moved"]
        frame = grouped[counts].sum(min_count=1)
        for prefix in ("", "control_"):
            frame[f"{prefix}moved"] = grouped[f"{prefix}moved"].mean()
            parts = frame[[f"{prefix}added", f"{prefix}removed", f"{prefix}kept"]].sum(axis=1, min_count=1)
            frame[f"{prefix}jaccard"] = frame[f"{prefix}kept"] / parts
        return frame.reset_index()

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.mask_diff` of this result."""
        from stream_lens import plots

        return plots.mask_diff(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object: tables by column, NaN as null."""
        return json_of(self)


def mask_diff(
    success: Source | Iterable[Source],
    failure: Source | Iterable[Source],
    segments: Segments | Sequence[Segments] | None = None,
    failure_segments: Segments | Sequence[Segments] | None = None,
    *,
    test: Test = "wilcoxon",
    seed: int = 0,
) -> MaskDiff:
    """Compare successful with failed runs, pair by pair.

    Args:
        success, failure: caches, patterns, masks, or dicts of these by layer; or as many of each, paired in order. A
            batch is as many runs as it has rows.
        segments: None compares block by block, over runs of one length and block size. Segments, one for all runs or
            one a run, compare by segment; what lies between them is compared too, under names of its own.
        failure_segments: those of `failure`; None takes `segments` for both.
        test: "wilcoxon", "sign" or "permutation", two-sided, on the cells' differences over pairs; q values are
            Benjamini and Hochberg's over all cells. With few pairs no p value can be small: 5 pairs reach 0.06.
        seed: of the random pairs of the control.

    Raises:
        ValueError: not as many failures as successes; runs that do not align; an unknown test.
    """
    check_test(test)
    if segments is None and failure_segments is not None:
        raise ValueError("failure_segments were given without segments: give those of the successful runs too.")
    ours = kept_in_runs(success, segments)
    theirs = kept_in_runs(failure, segments if failure_segments is None else failure_segments)
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} successful and {len(theirs)} failed runs were given: give pairs.")
    cells = aligned_cells([*ours, *theirs])
    pairs = len(ours)
    matched = [(cells.row(a), cells.row(pairs + a)) for a in range(pairs)]
    heads = _head_figures(cells, matched)
    control = _control_pairs(pairs, seed)
    controls = _head_figures(cells, [(cells.row(a), cells.row(b)) for a, b in control]) if control else None
    return MaskDiff(
        cells=_cell_figures(cells, pairs, test),
        heads=_head_frame(cells, heads, controls),
        query_labels=ours[0].query_labels,
        key_labels=ours[0].key_labels,
        by="block" if segments is None else "segment",
        pairs=pairs,
        control_pairs=len(control),
        test=test,
        about=ours[0].about,
    )


def _cell_figures(cells: Cells, pairs: int, test: Test) -> pd.DataFrame:
    kept_s, kept_f = cells.kept[:pairs], cells.kept[pairs:]
    share_s, share_f = cells.share[:pairs], cells.share[pairs:]
    differences = share_s - share_f if cells.weighted else kept_s.astype(np.float32) - kept_f
    layer, head, query, key = cells.places()
    frame = pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "query": query,
            "key": key,
            "added": (kept_s & ~kept_f).mean(0),
            "removed": (kept_f & ~kept_s).mean(0),
            "kept": (kept_s & kept_f).mean(0),
            "success": share_s.mean(0, dtype=float),
            "failure": share_f.mean(0, dtype=float),
            "difference": differences.mean(0, dtype=float),
        }
    )
    p_values = paired_p_values(differences, test) if pairs > 1 else np.full(len(frame), np.nan)
    frame["p_value"] = p_values
    frame["q_value"] = corrected(p_values) if pairs > 1 else p_values
    return frame


def _head_figures(cells: Cells, pairs: Sequence[tuple[Kept, Kept]]) -> np.ndarray:
    """[head of a layer, figure], mean over pairs, in the order of _FIGURES."""
    number, count = cells.head_number()
    total = np.zeros((count, len(_FIGURES)))
    for (kept_a, share_a, rows_a), (kept_b, share_b, rows_b) in pairs:
        moved = np.abs(share_a - share_b) / 2 / max(min(rows_a, rows_b), 1)
        for at, values in enumerate((kept_a & ~kept_b, kept_b & ~kept_a, kept_a & kept_b, moved)):
            total[:, at] += np.bincount(number, weights=values, minlength=count)
    return total / len(pairs)


def _control_pairs(runs: int, seed: int) -> list[tuple[int, int]]:
    """As many random pairs of two successes and of two failures as there are runs of each; none twice."""
    random, found = np.random.default_rng(seed), []
    every = [(a, b) for a in range(runs) for b in range(a)]
    for group in (0, runs):
        chosen = random.permutation(len(every))[:runs]
        found += [(group + every[at][0], group + every[at][1]) for at in chosen]
    return found


def _head_frame(cells: Cells, figures: np.ndarray, controls: np.ndarray | None) -> pd.DataFrame:
    heads = cells.shape[1]
    frame = pd.DataFrame({"layer": np.repeat(cells.layers, heads), "head": np.tile(range(heads), len(cells.layers))})
    controls = np.full_like(figures, np.nan) if controls is None else controls
    for prefix, values in (("", figures), ("control_", controls)):
        for name, column in zip(_FIGURES, values.T, strict=True):
            frame[prefix + name] = column
    return frame

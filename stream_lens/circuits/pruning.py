"""What attribution scores are worth: real ablations beside them, and the fewest blocks that keep a metric."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Float, Int

from stream_lens.blocks import BlockMask
from stream_lens.blocks.block_mask import trimmed
from stream_lens.circuits.attribution import Edges, GateAttribution, by_magnitude, frame_of_edges
from stream_lens.circuits.gated_run import GatedRun, Gates
from stream_lens.circuits.results import json_of


@dataclass(frozen=True, eq=False)
class AblationCheck:
    """Scores beside what really happens without the block.

    Attributes:
        table: one row an ablated block: layer, batch, head, q_block, k_block, score, effect (the metric of the full
            run minus that without the block).
        pearson, spearman: correlation of score and effect over the table; NaN where one of them is constant.
        n: blocks ablated.
        sample: how they were drawn.
        about: model, T, k and pruned share, for titles; empty where that is not known.
    """

    table: pd.DataFrame
    pearson: float
    spearman: float
    n: int
    sample: str
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.ablation_check` of this result."""
        from stream_lens import plots

        return plots.ablation_check(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; NaN is null."""
        return json_of(self)


def check_by_ablation(
    attribution: GateAttribution,
    n: int = 200,
    seed: int = 0,
    *,
    sample: Literal["uniform", "by_rank"] = "uniform",
    batch: int = 1,
) -> AblationCheck:
    """Set the gate of single blocks to 0, one forward each, and correlate the effects with the scores.

    Args:
        attribution: what to check.
        n: blocks to ablate, at most all.
        seed: of the sample.
        sample: "uniform" over kept blocks. Nearly all of them may do nothing, so "by_rank" takes equally many from
            each doubling of rank by |score|: the best, the next 2, the next 4, …
        batch: ablations run together as one batch of copies of the input: faster on GPUs.

    Raises:
        ValueError: n or batch is less than 1; `sample` is not known.
    """
    places, scores = attribution.edges()
    if n < 1 or batch < 1:
        raise ValueError(f"n={n} and batch={batch} are not allowed: give at least 1.")
    rng = np.random.default_rng(seed)
    if sample == "uniform":
        chosen = rng.permutation(len(places))[:n]
    elif sample == "by_rank":
        chosen = _by_rank(scores, n, rng)
    else:
        raise ValueError(f"sample={sample!r} is not known: choose uniform or by_rank.")
    run, effects = attribution.run, []
    (full,) = run.values([run.ones()])
    for start in range(0, len(chosen), batch):
        gates = [_without(run, places[[edge]]) for edge in chosen[start : start + batch]]
        effects += [full - value for value in run.values(gates)]
    table = frame_of_edges(attribution.masks, places[chosen]).assign(score=scores[chosen], effect=effects)
    pearson, spearman = _correlations(table)
    return AblationCheck(table, pearson, spearman, len(chosen), sample, attribution.about)


@dataclass(frozen=True, eq=False)
class PrunedEdges:
    """The smallest set of top-scored blocks that keeps the metric.

    Faithfulness is (metric with these blocks − metric with none) / (metric with all − metric with none); it may exceed
    1. The metric need not rise steadily with the number of blocks: `edges` passed and the next smaller number tried
    failed.

    Attributes:
        masks: the blocks kept, by layer.
        edges, all_edges: how many those are, and how many there were.
        faithfulness: with these blocks.
        threshold: what was asked for.
        full, none: the metric with all blocks and with none.
        random: faithfulness of equally many random blocks, one a seed: the control.
        curve: one row a number of blocks tried, ascending: edges, value, faithfulness.
        about: of the run with all blocks: model, T, k and pruned share, for titles.
    """

    masks: dict[int, BlockMask]
    edges: int
    all_edges: int
    faithfulness: float
    threshold: float
    full: float
    none: float
    random: tuple[float, ...]
    curve: pd.DataFrame
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """The curve."""
        return self.curve

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.pruning` of this result."""
        from stream_lens import plots

        return plots.pruning(self, **options)

    def to_json(self) -> str:
        """All of it but the masks as a JSON object."""
        return json_of({name: value for name, value in self.__dict__.items() if name != "masks"})


def prune(
    attribution: GateAttribution,
    faithfulness: float = 0.9,
    *,
    renormalise: bool = False,
    tolerance: float = 0.01,
    random_seeds: int = 3,
) -> PrunedEdges:
    """The fewest blocks, by |score|, whose run alone recovers a share of the metric. Real forwards, no T × T.

    Doubles the number of blocks until one passes, then bisects between it and the one before.

    Args:
        attribution: scores, and the run they belong to.
        faithfulness: the share to recover, above 0 and at most 1.
        renormalise: drop the other blocks before the softmax instead of zeroing them after it, so that the rest of a
            row takes their probability.
        tolerance: stop when the bracket is no wider than this share of the number; 0 for the exact number.
        random_seeds: sets of equally many random blocks to run as a control.

    Raises:
        ValueError: the share is out of range; the metric is the same with all blocks and with none.
    """
    if not 0 < faithfulness <= 1:
        raise ValueError(f"faithfulness={faithfulness} is not allowed: give a share in (0, 1].")
    places, scores = attribution.edges()
    search = _Pruning(attribution.run, places, by_magnitude(scores), renormalise)
    full, none = search.value(len(places)), search.value(0)
    if abs(full - none) <= 1e-6 * max(abs(full), abs(none)):
        raise ValueError(
            f"the metric is {full:.6g} with all blocks and {none:.6g} with none: attention does not carry it, so no "
            "share of it can be recovered. Use a metric that depends on the context."
        )
    low, high, tried = 0, len(places), {0: none, len(places): full}

    def passes(edges: int) -> bool:
        tried[edges] = search.value(edges)
        return (tried[edges] - none) / (full - none) >= faithfulness

    size = 1
    while size < high and not passes(size):
        low, size = size, size * 2
    high = min(size, high)
    while high - low > max(1, int(tolerance * high)):
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    curve = pd.DataFrame(sorted(tried.items()), columns=["edges", "value"])
    curve["faithfulness"] = (curve["value"] - none) / (full - none)
    random = [search.value(high, seed) for seed in range(random_seeds)]
    return PrunedEdges(
        masks=_kept_only(attribution.masks, places[search.order[:high]]),
        edges=high,
        all_edges=len(places),
        faithfulness=(tried[high] - none) / (full - none),
        threshold=faithfulness,
        full=full,
        none=none,
        random=tuple((value - none) / (full - none) for value in random),
        curve=curve,
        about=attribution.about,
    )


@dataclass(frozen=True, eq=False)
class _Pruning:
    run: GatedRun
    places: Edges
    order: Int[np.ndarray, " edge"]
    renormalise: bool

    def value(self, edges: int, seed: int | None = None) -> float:
        """The metric with the best blocks only, or with as many that `seed` draws."""
        order = self.order if seed is None else np.random.default_rng(seed).permutation(len(self.places))
        (value,) = self.run.values([_only(self.run, self.places[order[:edges]])], renormalise=self.renormalise)
        return value


def _by_rank(scores: Float[np.ndarray, " edge"], n: int, rng: np.random.Generator) -> Int[np.ndarray, " edge"]:
    """n edges, equally many from each doubling of rank; what a short doubling lacks, the later ones give."""
    order = by_magnitude(scores)
    starts = [2**power - 1 for power in range(len(order).bit_length())]
    strata = [order[start : 2 * start + 1] for start in starts if start < len(order)]
    chosen: list[np.ndarray] = []
    left = min(n, len(order))
    for number, stratum in enumerate(strata):
        share = min(len(stratum), -(-left // (len(strata) - number)))
        chosen.append(rng.permutation(stratum)[:share])
        left -= share
    return np.concatenate(chosen)


def _correlations(table: pd.DataFrame) -> tuple[float, float]:
    if len(table) < 2 or table["score"].nunique() < 2 or table["effect"].nunique() < 2:
        return float("nan"), float("nan")
    pearson = scipy.stats.pearsonr(table["score"], table["effect"]).statistic
    return float(pearson), float(scipy.stats.spearmanr(table["score"], table["effect"]).statistic)


def _without(run: GatedRun, places: Edges) -> Gates:
    return _set(run.ones(), places, 0.0)


def _only(run: GatedRun, places: Edges) -> Gates:
    return _set({layer: torch.zeros_like(gate) for layer, gate in run.ones().items()}, places, 1.0)


def _set(gates: Gates, places: Edges, value: float) -> Gates:
    for layer, index in _by_layer(gates, places):
        gates[layer][index] = value
    return gates


def _by_layer(layers: Iterable[int], places: Edges) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
    """Each layer's edges as an index into its [batch, head, q_blocks, k] tensors."""
    table = torch.from_numpy(np.ascontiguousarray(places)).long()
    return [(layer, table[table[:, 0] == number, 1:].unbind(1)) for number, layer in enumerate(layers)]


def _kept_only(masks: dict[int, BlockMask], places: Edges) -> dict[int, BlockMask]:
    kept = {}
    for layer, index in _by_layer(masks, places):
        mask = masks[layer]
        here = torch.zeros(mask.indices.shape, dtype=torch.bool)
        here[index] = True
        pruned = mask.where(here.to(mask.indices.device))
        kept[layer] = replace(pruned, indices=trimmed(pruned.indices))
    return kept

"""Heads against random heads: whether some heads matter more to a metric than as many others would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Int
from torch import Tensor

from stream_lens.blocks import StreamConfig
from stream_lens.circuits.ablation import Head, How, ablate, drop_heads
from stream_lens.circuits.edited_runs import streamed_for_now, streamed_layers
from stream_lens.circuits.metrics import MetricFunction
from stream_lens.circuits.results import json_of


@dataclass(frozen=True, eq=False)
class HeadsAgainstRandom:
    """What a metric loses without some heads, and without as many random ones. Means over inputs.

    Attributes:
        heads: the heads in question.
        base: the metric with all heads.
        effect: base minus the metric without `heads`.
        random_effects: the same without as many random heads, one number a seed.
        random_mean: their mean.
        interval: of that mean, by Student's t over seeds; NaN with a single seed.
        confidence: of the interval.
        inputs: how many inputs stand behind each number.
        random_heads: the heads of each seed.
        about: model, T, k and pruned share of the first input, for titles.
    """

    heads: tuple[Head, ...]
    base: float
    effect: float
    random_effects: tuple[float, ...]
    random_mean: float
    interval: tuple[float, float]
    confidence: float
    inputs: int
    random_heads: tuple[tuple[Head, ...], ...] = field(repr=False)
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row a set of heads: name, seed (NA for the heads in question), effect."""
        names = ["chosen heads"] + ["random heads"] * len(self.random_effects)
        seeds = pd.array([pd.NA, *range(len(self.random_effects))], dtype="Int64")
        return pd.DataFrame({"name": names, "seed": seeds, "effect": [self.effect, *self.random_effects]})

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.ablation` of this result."""
        from stream_lens import plots

        return plots.ablation(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; NaN is null."""
        return json_of(self)


def heads_against_random(
    model: Any,
    inputs: Sequence[tuple[Int[Tensor, "batch position"], MetricFunction]],
    heads: Sequence[Head],
    config: StreamConfig | None = None,
    *,
    seeds: int = 5,
    same_layers: bool = False,
    confidence: float = 0.95,
    how: How = "drop",
) -> HeadsAgainstRandom:
    """Take out some heads (receiver heads, retrieval heads …), and, as a control, as many random others.

    Args:
        model, config, how: as for `ablate`.
        inputs: (token ids, metric) pairs; numbers are means over them.
        heads: (layer, head) pairs.
        seeds: random sets to draw, from heads that are not among `heads`.
        same_layers: draw each set from the same layers, as many from each: a sharper control.
        confidence: of the interval around the mean of the random sets.

    Raises:
        ValueError: no input or head is given, a head does not exist, or too few other heads are left to draw from.
    """
    if not inputs or not heads or seeds < 1:
        raise ValueError("heads_against_random needs at least 1 input, 1 head and 1 seed.")
    with streamed_for_now(model, config):
        every = [(layer, head) for layer in streamed_layers(model) for head in range(model.cfg.n_heads)]
        drawn = [random_heads(heads, every, seed, same_layers) for seed in range(seeds)]
        sets = [drop_heads("chosen", heads), *(drop_heads(f"random {n}", each) for n, each in enumerate(drawn))]
        found = [ablate(model, tokens, sets, metric, how=how) for tokens, metric in inputs]
    effects = np.mean([each.table["effect"].to_numpy() for each in found], axis=0)
    random = effects[1:]
    return HeadsAgainstRandom(
        heads=tuple(heads),
        base=float(np.mean([each.base for each in found])),
        effect=float(effects[0]),
        random_effects=tuple(random.tolist()),
        random_mean=float(random.mean()),
        interval=_interval(random, confidence),
        confidence=confidence,
        inputs=len(inputs),
        random_heads=tuple(drawn),
        about=found[0].about,
    )


def random_heads(heads: Sequence[Head], every: Sequence[Head], seed: int, same_layers: bool) -> tuple[Head, ...]:
    """As many heads as given, drawn from the others; from the same layers if so asked."""
    rng = np.random.default_rng(seed)
    others = [head for head in every if head not in set(heads)]
    groups = [(len(heads), others)]
    if same_layers:
        layers = sorted({layer for layer, _ in heads})
        groups = [(sum(h[0] == layer for h in heads), [h for h in others if h[0] == layer]) for layer in layers]
    drawn: list[Head] = []
    for wanted, pool in groups:
        if len(pool) < wanted:
            raise ValueError(
                f"{wanted} random heads cannot be drawn from {len(pool)} others: give fewer heads"
                + (", or same_layers=False." if same_layers else ".")
            )
        drawn += [pool[i] for i in sorted(rng.permutation(len(pool))[:wanted])]
    return tuple(drawn)


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    if len(values) < 2:
        return float("nan"), float("nan")
    half = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * scipy.stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)

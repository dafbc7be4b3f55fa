"""Receiver heads: the heads whose vertical scores are most peaked: later text keeps coming back to few segments.

As in Thought Anchors (arXiv 2506.19143): Fisher's kurtosis of each head's vertical scores over the segments of a text,
the mean over texts, and the heads with the largest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float

from stream_lens.circuits.results import json_of
from stream_lens.circuits.runs import Source
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.vertical_scores import VerticalScores, vertical_scores


@dataclass(frozen=True, eq=False)
class ReceiverHeads:
    """Heads by the kurtosis of their vertical scores.

    Attributes:
        heads: (layer, head) of the receiver heads, most peaked first.
        kurtosis: [layer, head], mean over texts; NaN where no text gave the head a kurtosis.
        by_text: [text, layer, head].
        layers: the number of each layer in the arrays.
        split_half: Pearson's r over heads between the kurtosis of even and of odd texts; None with fewer than 2 texts.
        about: model, T, k and pruned share of the first text, for titles; empty where that is not known.
    """

    heads: tuple[tuple[int, int], ...]
    kurtosis: Float[np.ndarray, "layer head"]
    by_text: Float[np.ndarray, "text layer head"]
    layers: tuple[int, ...]
    split_half: float | None
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row a head, most peaked first: layer, head, kurtosis, std (over texts), texts, receiver."""
        layer, head = np.indices(self.kurtosis.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # heads without a kurtosis in any text
            spread = np.nanstd(self.by_text, axis=0)
        frame = pd.DataFrame(
            {
                "layer": np.array(self.layers)[layer.ravel()],
                "head": head.ravel(),
                "kurtosis": self.kurtosis.ravel(),
                "std": spread.ravel(),
                "texts": np.isfinite(self.by_text).sum(0).ravel(),
            }
        )
        chosen = set(self.heads)
        frame["receiver"] = [pair in chosen for pair in zip(frame["layer"], frame["head"], strict=True)]
        return frame.sort_values("kurtosis", ascending=False, kind="stable", ignore_index=True)

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.kurtosis` of this result."""
        from stream_lens import plots

        return plots.kurtosis(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; NaN is null."""
        return json_of(self)


@dataclass(frozen=True)
class RankCorrelation:
    """How alike two rankings of the same heads are.

    Attributes:
        spearman: rank correlation of the kurtosis over all heads that have one in both.
        heads: how many those are.
        top_shared: receiver heads in both, as a share of the shorter list.
    """

    spearman: float
    heads: int
    top_shared: float


def receiver_heads(
    caches: Source | Iterable[Source] | VerticalScores,
    segments: Segments | Sequence[Segments] | None = None,
    *,
    top_n: int = 20,
    skip_layers: Iterable[int] = (),
    **options: Any,
) -> ReceiverHeads:
    """Rank all heads by the kurtosis of their vertical scores, averaged over texts.

    Args:
        caches, segments, **options: as for `vertical_scores` (min_distance, control_depth, exact); or its result alone.
        top_n: how many heads to call receiver heads.
        skip_layers: layers whose heads are not called so (the original's plots leave out layer 0).

    Raises:
        ValueError: what `vertical_scores` raises; top_n below 1; segments or options beside a VerticalScores.
        TypeError: caches without segments.
    """
    if top_n < 1:
        raise ValueError(f"top_n={top_n} is not allowed: ask for at least 1 head.")
    if isinstance(caches, VerticalScores):
        if segments is not None or options:
            raise ValueError(
                "the vertical scores are made already, so segments and options cannot take effect: leave them out."
            )
        scores = caches
    elif segments is None:
        raise TypeError("receiver_heads needs the segments of the caches' texts: receiver_heads(cache, segments).")
    else:
        scores = vertical_scores(caches, segments, **options)
    by_text = scores.kurtosis()
    mean = _mean(by_text)
    ranked = mean.copy()
    ranked[np.isin(scores.layers, list(skip_layers))] = np.nan
    order = np.argsort(-ranked.ravel(), kind="stable")
    order = order[np.isfinite(ranked.ravel()[order])][:top_n]
    layer, head = np.unravel_index(order, mean.shape)
    heads = tuple((scores.layers[at], int(number)) for at, number in zip(layer, head, strict=True))
    return ReceiverHeads(heads, mean, by_text, scores.layers, _split_half(by_text), scores.about)


def rank_correlation(one: ReceiverHeads, other: ReceiverHeads) -> RankCorrelation:
    """Spearman's correlation between two rankings, for instance of dense and of sparse runs of the same texts.

    Raises:
        ValueError: different layers or numbers of heads; fewer than 3 heads with a kurtosis in both.
    """
    if one.layers != other.layers or one.kurtosis.shape != other.kurtosis.shape:
        raise ValueError(
            f"the rankings are of layers {list(one.layers)} and {list(other.layers)}, with {one.kurtosis.shape[1]} and "
            f"{other.kurtosis.shape[1]} heads: give two of the same model and layers."
        )
    both = np.isfinite(one.kurtosis) & np.isfinite(other.kurtosis)
    if both.sum() < 3:
        raise ValueError(f"only {both.sum()} heads have a kurtosis in both rankings: at least 3 are needed.")
    found = scipy.stats.spearmanr(one.kurtosis[both], other.kurtosis[both])
    shared = set(one.heads) & set(other.heads)
    shorter = max(1, min(len(one.heads), len(other.heads)))
    return RankCorrelation(float(found.statistic), int(both.sum()), len(shared) / shorter)


def _mean(by_text: Float[np.ndarray, "text layer head"]) -> Float[np.ndarray, "layer head"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # heads without a kurtosis in any text
        return np.nanmean(by_text, axis=0)


def _split_half(by_text: Float[np.ndarray, "text layer head"]) -> float | None:
    if len(by_text) < 2:
        return None
    even, odd = _mean(by_text[0::2]), _mean(by_text[1::2])
    both = np.isfinite(even) & np.isfinite(odd)
    if both.sum() < 2:
        return None
    return float(scipy.stats.pearsonr(even[both], odd[both]).statistic)

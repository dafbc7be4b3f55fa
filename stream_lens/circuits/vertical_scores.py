"""Vertical scores: how much attention each segment gets from all later ones that are not near, for every head.

Thought Anchors (arXiv 2506.19143) defines them on dense patterns; `vertical_scores` keeps the definition and works on
sparse ones, where a key block that was dropped counts as zero attention:

1. A[i, j]: mean over all pairs of a row of segment i and a key of segment j.
2. Vertical score of j: mean of A[i, j] over all later segments i with i − j ≥ min_distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float

from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.pattern_data import padded_left
from stream_lens.circuits.results import json_of
from stream_lens.circuits.runs import Pattern, Run, Source, runs_of
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.span_sums import SpanSums, span_sums

_RANKED_AT_ONCE = 4 << 20  # cells of segment × segment that ranks are made of in one step


@dataclass(frozen=True, eq=False)
class VerticalScores:
    """Vertical scores of one or more texts.

    Attributes:
        scores: for each text, [layer, head, segment]: mean probability of a token pair (of its rank, with
            control_depth). NaN for the last min_distance segments and for segments without tokens.
        segments: each text's.
        layers: the number of each layer in `scores`.
        min_distance, control_depth: as asked for.
        exact: whether every sum was of tokens' own probabilities; False where block masses were shared out by overlap.
        about: model, T, k and pruned share of the first text, for titles; empty where that is not known.
    """

    scores: tuple[Float[np.ndarray, "layer head segment"], ...]
    segments: tuple[Segments, ...]
    layers: tuple[int, ...]
    min_distance: int
    control_depth: bool
    exact: bool
    about: str = ""

    def kurtosis(self) -> Float[np.ndarray, "text layer head"]:
        """Fisher's kurtosis (biased, NaN left out) of every head's vertical scores over the segments of each text.

        NaN where a head's scores are all the same, for instance all zero.
        """
        return np.stack([_kurtosis(scores) for scores in self.scores])

    def to_frame(self) -> pd.DataFrame:
        """One row a text, layer, head and segment: label, category, vertical_score."""
        frames = []
        for text, (scores, segments) in enumerate(zip(self.scores, self.segments, strict=True)):
            _, heads, count = scores.shape
            index = pd.MultiIndex.from_product(
                [[text], self.layers, range(heads), range(count)], names=["text", "layer", "head", "segment"]
            )
            frame = pd.DataFrame({"vertical_score": scores.ravel()}, index=index).reset_index()
            frame.insert(4, "label", np.tile(np.array(segments.labels, dtype=object), len(frame) // max(count, 1)))
            frame.insert(
                5, "category", np.tile(np.array(segments.categories, dtype=object), len(frame) // max(count, 1))
            )
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.vertical_scores` of this result."""
        from stream_lens import plots

        return plots.vertical_scores(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; NaN is null."""
        return json_of(self)


def vertical_scores(
    caches: Source | Iterable[Source],
    segments: Segments | Sequence[Segments],
    *,
    min_distance: int = 4,
    control_depth: bool = False,
    exact: bool | Literal["auto"] = "auto",
) -> VerticalScores:
    """Vertical scores of every layer and head, for each text.

    Args:
        caches: one cache, pattern, or dict of patterns by layer (a batch is as many texts as it has rows), or several.
            Dense patterns and caches of dense patterns are summed token by token: the reference.
        segments: one for all texts, or one a text. A text shorter than the pattern must be padded on the right.
        min_distance: how many segments later the nearest counted one stands (`proximity_ignore` in the original).
        control_depth: score ranks instead of probabilities: each A[i, j] is replaced by its rank among those of row i
            (ties share their mean rank) ÷ their number, since later rows spread their attention over more segments.
        exact: True computes tokens' probabilities again from queries and keys, over the kept blocks only, and so needs
            patterns that hold them (`keep_scores=True`); False shares each block's mass out by overlap, which is the
            same where segments end at block edges and nothing else is in their blocks; "auto" is exact where the
            pattern allows it.

    Raises:
        NoScoresError: exact=True without queries and keys.
        ValueError: segments of another text length, not one a text, or patterns that do not begin at position 0;
            min_distance below 1; texts with other layers or heads than the first.
    """
    if min_distance < 1:
        raise ValueError(f"min_distance={min_distance} is not allowed: a later segment is at least 1 further on.")
    check_exact(exact)
    wanted = None if exact == "auto" else bool(exact)
    found: list[np.ndarray] = []
    used: list[Segments] = []
    layers: tuple[int, ...] | None = None
    about = ""
    all_exact = True
    for run, text_segments in with_segments(caches, segments):
        rows = []
        for pattern in run.layers.values():
            spans = text_segments.token_spans
            sums = span_sums(pattern, spans, spans, exact=wanted, observe=run.observe)
            all_exact &= sums.exact
            rows.append(_scores(sums, text_segments, min_distance, control_depth))
        if layers is None:
            layers, about = tuple(run.layers), run.about
        if layers != tuple(run.layers) or len({row.shape for row in rows}) > 1:
            raise ValueError(
                f"the texts have patterns of layers {list(layers)} and {list(run.layers)}, with "
                f"{sorted({len(row) for row in rows})} heads: give the same layers of each, with as many heads."
            )
        found.append(np.stack(rows))
        used.append(text_segments)
    if layers is None:
        raise ValueError("no caches were given.")
    return VerticalScores(tuple(found), tuple(used), layers, min_distance, control_depth, all_exact, about)


def with_segments(
    caches: Source | Iterable[Source], segments: Segments | Sequence[Segments]
) -> Iterator[tuple[Run, Segments]]:
    """Every text's run with its segments, checked to be of the same tokens."""
    shared = isinstance(segments, Segments)
    given: Iterator[Segments] = repeat(segments) if isinstance(segments, Segments) else iter(segments)
    texts = 0
    for run in runs_of(caches):
        texts += 1
        own = next(given, None)
        if own is None:
            raise ValueError(f"there are more texts than the {texts - 1} segments: give one for each, or one for all.")
        for layer, pattern in run.layers.items():
            check_same_tokens(pattern, own, f"layer {layer}", padded=not shared)
        yield run, own
    if not shared and next(given, None) is not None:
        raise ValueError(f"there are more segments than the {texts} texts: give one for each.")


def check_same_tokens(pattern: Pattern, segments: Segments, place: str, *, padded: bool = False) -> None:
    """Raise ValueError unless the pattern is the square one of the segments' tokens, or longer where `padded`."""
    q_len, kv_len = pattern.shape[-2:]
    n_tokens = segments.n_tokens
    if q_len != kv_len or n_tokens > kv_len or (n_tokens < kv_len and not padded):
        remedy = "run the model on segments.text with the same prepend_bos, in one pass"
        if n_tokens < kv_len and q_len == kv_len:
            remedy += "; for a padded batch give a list of segments, one a text"
        raise ValueError(
            f"{place} has a pattern of {q_len} queries by {kv_len} keys and the segments' text {n_tokens} tokens: "
            f"{remedy}."
        )
    if n_tokens < kv_len and isinstance(pattern, SparsePattern) and padded_left(pattern.data_)[0]:
        raise ValueError(
            f"{place} is padded on the left, so its positions are not the segments': run with padding_side='right'."
        )


def check_exact(exact: object) -> None:
    """Raise ValueError unless `exact` is True, False or "auto"."""
    if exact not in (True, False, "auto"):
        raise ValueError(f'exact={exact!r} is not known: give True, False or "auto".')


def _scores(
    sums: SpanSums, segments: Segments, min_distance: int, control_depth: bool
) -> Float[np.ndarray, "head segment"]:
    size = np.array([stop - start for start, stop in segments.token_spans], dtype=np.int64)
    count = len(size)
    far = sums.query - sums.key >= min_distance
    head, query, key = sums.head[far], sums.query[far], sums.key[far]
    mean = sums.mass[far] / (size[query] * size[key])
    if control_depth:
        totals = _rank_totals(head, query, key, mean, size, sums.n_heads, min_distance)
    else:
        totals = np.bincount(head * count + key, weights=mean, minlength=sums.n_heads * count)
        totals = totals.reshape(sums.n_heads, count)
    filled = np.concatenate([np.cumsum((size > 0)[::-1])[::-1], np.zeros(min_distance, dtype=np.int64)])
    later = filled[min_distance : min_distance + count]  # segments with tokens at j + min_distance or after
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((later > 0) & (size > 0), totals / later, np.nan)


def _rank_totals(
    head: np.ndarray, query: np.ndarray, key: np.ndarray, mean: np.ndarray, size: np.ndarray, heads: int, distance: int
) -> Float[np.ndarray, "head segment"]:
    """Ranks ÷ their number, summed over rows; pairs without an entry are zeros and take part."""
    count = len(size)
    totals = np.zeros((heads, count))
    step = max(1, _RANKED_AT_ONCE // max(heads * count, 1))
    for first in range(0, count, step):
        rows = np.arange(first, min(first + step, count))
        cells = np.zeros((heads, len(rows), count))
        here = (query >= first) & (query < first + step)
        cells[head[here], query[here] - first, key[here]] = mean[here]
        seen = (np.arange(count) <= rows[:, None] - distance) & (size > 0) & (size[rows, None] > 0)
        ranks = scipy.stats.rankdata(np.where(seen, cells, np.inf), axis=-1)
        totals += np.where(seen, ranks / np.maximum(seen.sum(-1, keepdims=True), 1), 0.0).sum(1)
    return totals


def _kurtosis(scores: Float[np.ndarray, "layer head segment"]) -> Float[np.ndarray, "layer head"]:
    varied = np.nanmax(scores, -1, initial=-np.inf) > np.nanmin(scores, -1, initial=np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = scipy.stats.kurtosis(np.where(varied[..., None], scores, 0.0), -1, nan_policy="omit")
    return np.where(varied, np.asarray(found, dtype=float), np.nan)

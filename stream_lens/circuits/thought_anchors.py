"""Thought anchors: how much the receiver heads come back to each segment, and to each category of segments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from stream_lens.circuits.receiver_heads import ReceiverHeads, receiver_heads
from stream_lens.circuits.results import json_of
from stream_lens.circuits.runs import Source
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.vertical_scores import VerticalScores, vertical_scores

Heads = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class ThoughtAnchors:
    """Vertical scores averaged over receiver heads.

    Attributes:
        scores: for each text, one number a segment; NaN for the last segments, as in `VerticalScores`.
        segments: each text's, with the categories used.
        heads: (layer, head) averaged over.
    """

    scores: tuple[Float[np.ndarray, " segment"], ...]
    segments: tuple[Segments, ...]
    heads: tuple[tuple[int, int], ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a segment: text, segment, label, category, score, share (of the text's total), text_of_segment."""
        frames = []
        for text, (scores, segments) in enumerate(zip(self.scores, self.segments, strict=True)):
            total = np.nansum(scores)
            frames.append(
                pd.DataFrame(
                    {
                        "text": text,
                        "segment": range(len(scores)),
                        "label": segments.labels,
                        "category": segments.categories,
                        "score": scores,
                        "share": scores / total if total else np.full_like(scores, np.nan),
                        "text_of_segment": segments.texts,
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def by_category(self) -> pd.DataFrame:
        """One row a category, highest first: segments, texts, mean and standard error of their scores.

        Segments without a score or a category are left out.

        Raises:
            ValueError: no segment has a category.
        """
        frame = self.to_frame().dropna(subset=["score", "category"])
        if all(category is None for segments in self.segments for category in segments.categories):
            raise ValueError(
                "no segment has a category: give categories, for instance label_by_keywords(segments.texts)."
            )
        found = frame.groupby("category").agg(
            segments=("score", "size"), texts=("text", "nunique"), mean=("score", "mean"), sem=("score", "sem")
        )
        return found.sort_values("mean", ascending=False).reset_index()

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.thought_anchors` of this result."""
        from stream_lens import plots

        return plots.thought_anchors(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; NaN is null."""
        return json_of(self)


def thought_anchors(
    caches: Source | Iterable[Source] | VerticalScores,
    segments: Segments | Sequence[Segments] | None = None,
    heads: ReceiverHeads | Heads | None = None,
    categories: Sequence[str | None] | Sequence[Sequence[str | None]] | None = None,
    *,
    top_n: int = 20,
    **options: Any,
) -> ThoughtAnchors:
    """Average the vertical scores of each segment over the receiver heads.

    Args:
        caches, segments, **options: as for `vertical_scores` (min_distance, control_depth, exact); or its result alone.
        heads: a `ReceiverHeads`, or (layer, head) pairs; None finds the `top_n` receiver heads on these texts.
        categories: one a segment, or such a list for each text, instead of the segments' own.
        top_n: only without `heads`.

    Raises:
        ValueError: what `vertical_scores` raises; heads in layers that the caches do not have; categories that are not
            one a segment; segments or options beside a VerticalScores.
        TypeError: caches without segments.
    """
    if isinstance(caches, VerticalScores):
        if segments is not None or options:
            raise ValueError(
                "the vertical scores are made already, so segments and options cannot take effect: leave them out."
            )
        scores = caches
    elif segments is None:
        raise TypeError("thought_anchors needs the segments of the caches' texts: thought_anchors(cache, segments).")
    else:
        scores = vertical_scores(caches, segments, **options)
    if heads is None:
        heads = receiver_heads(scores, top_n=top_n)
    pairs = heads.heads if isinstance(heads, ReceiverHeads) else tuple((int(at), int(head)) for at, head in heads)
    rows, columns = _places(pairs, scores)
    averaged = tuple(text[rows, columns].mean(0) for text in scores.scores)
    return ThoughtAnchors(averaged, _labelled(scores.segments, categories), pairs)


def _places(pairs: Heads, scores: VerticalScores) -> tuple[list[int], list[int]]:
    if not pairs:
        raise ValueError("there is no head to average over: give at least one (layer, head).")
    n_heads = scores.scores[0].shape[1]
    missing = [pair for pair in pairs if pair[0] not in scores.layers or not 0 <= pair[1] < n_heads]
    if missing:
        raise ValueError(
            f"heads {missing} are not in the scores, which have layers {list(scores.layers)} of {n_heads} heads."
        )
    return [scores.layers.index(layer) for layer, _ in pairs], [head for _, head in pairs]


def _labelled(segments: tuple[Segments, ...], categories: Any) -> tuple[Segments, ...]:
    if categories is None:
        return segments
    one_list = all(category is None or isinstance(category, str) for category in categories)
    each = [categories] * len(segments) if one_list else list(categories)
    if len(each) != len(segments):
        raise ValueError(f"{len(segments)} texts need as many lists of categories; got {len(each)}.")
    return tuple(own.with_categories(given) for own, given in zip(segments, each, strict=True))

"""Definitions written out in loops, and small patterns and segments to hold the circuit tools to."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from stream_lens.backend.layer import StreamedLayer, attend
from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.scores import Scores
from stream_lens.blocks import ScoreRule, StreamConfig
from stream_lens.circuits.segments import Segments


def vertical_scores_of(pattern: Tensor, spans: list[tuple[int, int]], distance: int, ranks: bool = False) -> np.ndarray:
    """[head, segment] of a dense [head, query, key] pattern, from the definition in Thought Anchors."""
    p, count = pattern.double().numpy(), len(spans)
    found = np.full((len(p), count), np.nan)
    for head in range(len(p)):
        mean = np.full((count, count), np.nan)
        for i in range(count):
            for j in range(count):
                rows, keys = slice(*spans[i]), slice(*spans[j])
                if i - j >= distance and p[head, rows, keys].size:
                    mean[i, j] = p[head, rows, keys].mean()
            if ranks and not np.isnan(mean[i]).all():
                mean[i] = scipy.stats.rankdata(mean[i], nan_policy="omit") / np.sum(~np.isnan(mean[i]))
        for j in range(count):
            column = mean[j + distance :, j]
            if not np.isnan(column).all():
                found[head, j] = np.nanmean(column)
    return found


def kurtosis_of(scores: np.ndarray) -> np.ndarray:
    """[head] of [head, segment]."""
    return scipy.stats.kurtosis(scores, axis=-1, fisher=True, bias=True, nan_policy="omit")


def segments_at(spans: list[tuple[int, int]], n_tokens: int, labels: list[str] | None = None) -> Segments:
    """Segments at these token positions of a text of one character a token."""
    labels = labels or [f"segment {j}" for j in range(len(spans))]
    return Segments("x" * n_tokens, tuple(labels), (None,) * len(spans), tuple(spans), tuple(spans), n_tokens, 0)


def cut_at(*edges: int) -> list[tuple[int, int]]:
    """Spans between these positions."""
    return list(pairwise(edges))


def streamed(
    q: Tensor, k: Tensor, /, *, layer: int = 0, rule: ScoreRule | None = None, observe: bool = False, **choices: int
) -> SparsePattern:
    """The pattern that a streamed layer makes of these queries and keys, masses included."""
    rule = rule or ScoreRule(q.shape[-1] ** -0.5, k.shape[2] - q.shape[2])
    one = StreamedLayer(layer, f"blocks.{layer}.attn", StreamConfig(**choices), observe=observe)
    pattern = one.make_pattern(Scores(q, k, rule), q.dtype)
    attend(one, pattern, k)
    return pattern.detach()


def random_pattern(tokens: int, *, heads: int = 2, batch: int = 1, seed: int = 0, **choices: int) -> SparsePattern:
    """A streamed pattern of random queries and keys in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, tokens, 8, generator=generator, dtype=torch.float64) * 1.5 for _ in range(2))
    return streamed(q, k, **choices)

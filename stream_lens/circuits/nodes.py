"""Nodes: the spans of tokens that mask diffs and routes are drawn between, and what they are called."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stream_lens.circuits.segments import Segments
from stream_lens.circuits.text_tokens import Span


@dataclass(frozen=True)
class Nodes:
    """Ascending, disjoint spans [start, stop) of absolute token positions, one label each. A span may be empty."""

    labels: tuple[str, ...]
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.labels)


def block_nodes(tokens: int, size: int, first: int = 0) -> Nodes:
    """The blocks of `size` of tokens [first, first + tokens)."""
    starts = range(first, first + tokens, size)
    spans = tuple((start, min(start + size, first + tokens)) for start in starts)
    return Nodes(tuple(f"block {number}" for number in range(len(spans))), spans)


def segment_nodes(segments: Segments) -> Nodes:
    """The segments and, between them, the text that is in none: "BOS", "before A", "after A".

    What lies between is there even where it is empty, so that texts with the same segments have the same nodes.
    """
    labels, spans = [], []
    position = 0
    if segments.n_bos:
        labels.append("BOS")
        spans.append((0, segments.n_bos))
        position = segments.n_bos
    names = _distinct(segments.labels)
    for number, (name, (start, stop)) in enumerate(zip(names, segments.token_spans, strict=True)):
        labels += [f"before {name}" if number == 0 else f"after {names[number - 1]}", name]
        spans += [(position, max(position, start)), (start, stop)]
        position = max(position, stop)
    labels.append(f"after {names[-1]}" if names else "text")
    spans.append((position, segments.n_tokens))
    return Nodes(tuple(labels), tuple(spans))


def split_at(nodes: Nodes, tokens: Sequence[Span]) -> Nodes:
    """The same nodes cut where these spans begin and end; parts of one node are told apart by their tokens."""
    edges = np.unique([edge for span in tokens for edge in span])
    labels, spans = [], []
    for label, (start, stop) in zip(nodes.labels, nodes.spans, strict=True):
        inside = edges[(edges > start) & (edges < stop)].tolist()
        cuts = [start, *inside, stop]
        for low, high in pairwise(cuts):
            labels.append(label if not inside else f"{label} [{low}:{high}]")
            spans.append((low, high))
    return Nodes(tuple(labels), tuple(spans))


def without_empty(nodes: Nodes) -> Nodes:
    """The nodes that hold a token."""
    kept = [at for at, (start, stop) in enumerate(nodes.spans) if start < stop]
    return Nodes(tuple(nodes.labels[at] for at in kept), tuple(nodes.spans[at] for at in kept))


def _distinct(labels: Sequence[str]) -> list[str]:
    """Labels that occur more than once get a number: "needle 0", "needle 1"."""
    counts = Counter(labels)
    numbers = {label: itertools.count() for label in counts}
    found = []
    for label in labels:
        if counts[label] > 1:
            label = next(name for n in numbers[label] if (name := f"{label} {n}") not in counts)
        found.append(label)
    return found

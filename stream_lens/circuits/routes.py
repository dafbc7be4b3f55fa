"""Routes: the ways from a source (a needle) through kept blocks and the residual stream to a target (the last token).

1. Nodes are spans of tokens: blocks, or segments with what lies between them; source and target are cut out as nodes
   of their own. Attention between spans is exact where the patterns hold their queries and keys.
2. Every layer joins node j before it with node i after it, weighted as in attention rollout (`route_flow`).
3. Edges on no way from source to target are dropped; the rest carry flow; the strongest paths are found exactly.

A kept block is no proof of cause: a route says where information can have gone and how much attention went there. Hold
it to a control (a failed run, `route_diff`; a random source) and to an intervention (dropping its blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pandas as pd

from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import BlockMask
from stream_lens.circuits.nodes import Nodes, block_nodes, segment_nodes, split_at, without_empty
from stream_lens.circuits.route_flow import HeadRule, Step, flows, pruned, step_of, strongest_paths
from stream_lens.circuits.route_results import Hop, Route, Routes
from stream_lens.circuits.runs import Run, Source, runs_of
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.span_sums import span_sums
from stream_lens.circuits.text_tokens import Span
from stream_lens.circuits.vertical_scores import check_same_tokens

Place = int | str | Span
"""A token, the label of segments, or tokens [start, stop). Negative tokens count from the end."""


def routes(
    cache: Source,
    source: Place | Sequence[Place],
    target: Place | Sequence[Place] = -1,
    segments: Segments | None = None,
    *,
    heads: HeadRule = "mean",
    residual: float = 0.5,
    normalise: bool = True,
    paths: int = 10,
    max_edges: int = 20_000,
    batch: int = 0,
) -> Routes:
    """The routes from `source` to `target` through the patterns of a cache.

    Args:
        cache: a cache, or patterns by layer, with masses. Layers that it lacks are passed over unchanged.
        source, target: a token, tokens (start, stop), a label of `segments`, or several of these.
        segments: what nodes to make; None for key blocks.
        heads: how the heads of a layer become one weight: their mean, or the largest.
        residual: the residual stream's share of every step, 0 to 1 (attention rollout takes 0.5).
        normalise: scale each row's attention to sum to 1 before the residual takes its share: for heads="max", and for
            observed runs whose kept blocks hold only part of the attention. Without it such flow leaks away.
        paths: how many of the strongest paths (by product of weights) to give.
        max_edges: how many edges of the largest flow to give; those of the paths are always given. Flow, paths and
            reachability are computed on all.
        batch: which row of a batch. Of a padded batch give `segments`: without them the padding counts as text, and a
            target of −1 is the last of it.

    Raises:
        ValueError: a label that no segment has; a source or target without tokens; numbers out of range; patterns that
            are not those of the segments' tokens.
        TypeError: masks without masses.
    """
    _check(heads, residual, paths, max_edges)
    run = _row(cache, batch)
    tokens = _token_count(run, segments)
    places = [_spans(place, tokens, segments, name) for place, name in ((source, "source"), (target, "target"))]
    nodes = _nodes(run, tokens, segments, [span for spans in places for span in spans])
    starts, ends = (_inside(nodes, spans) for spans in places)
    sizes = np.array([stop - start for start, stop in nodes.spans])
    steps = [
        step_of(span_sums(pattern, nodes.spans, nodes.spans, observe=run.observe), sizes, heads, residual, normalise)
        for pattern in run.layers.values()
    ]
    steps, forward, backward = pruned(steps, starts, ends)
    weights = np.where(ends, sizes, 0) / sizes[ends].sum()
    edge_flow, node_flow, head_flow, total = flows(steps, starts.astype(float), weights)
    found = strongest_paths(steps, starts.astype(float), weights, paths)
    frame = _edges(steps, edge_flow, total)
    kept = _largest(frame, max_edges, [path for _, path in found], [len(step.query) for step in steps])
    return Routes(
        nodes=nodes,
        layers=tuple(run.layers),
        source=tuple(np.flatnonzero(starts).tolist()),
        target=tuple(np.flatnonzero(ends).tolist()),
        edges=frame.iloc[kept].reset_index(drop=True),
        paths=tuple(_route(path, weight, steps, tuple(run.layers), total) for weight, path in found),
        flow=total,
        reached=tuple(int((one & other).sum()) for one, other in zip(forward, backward, strict=True)),
        node_flow=np.stack(node_flow) / (total or 1.0),
        head_flow=_padded(head_flow, max(pattern.shape[1] for pattern in run.layers.values())) / (total or 1.0),
        total_edges=len(frame),
        heads=heads,
        residual=residual,
        about=run.about,
    )


def _check(heads: str, residual: float, paths: int, max_edges: int) -> None:
    if heads not in get_args(HeadRule):
        raise ValueError(f"heads={heads!r} is not known: choose one of {', '.join(get_args(HeadRule))}.")
    if not 0 <= residual < 1:
        raise ValueError(f"residual={residual} is not allowed: give 0 to below 1, or no attention would count.")
    if paths < 1 or max_edges < 1:
        raise ValueError(f"paths={paths} and max_edges={max_edges} must be at least 1.")


def _row(cache: Source, batch: int) -> Run:
    runs = list(runs_of(cache))
    if not 0 <= batch < len(runs):
        raise ValueError(f"batch={batch} is out of range: there are {len(runs)} texts.")
    return runs[batch]


def _token_count(run: Run, segments: Segments | None) -> int:
    for layer, pattern in run.layers.items():
        q_len, kv_len = pattern.shape[-2:]
        if isinstance(pattern, BlockMask):
            raise TypeError(
                "routes are weighted by attention, and only masks were given: give the cache or its patterns."
            )
        if q_len != kv_len:
            raise ValueError(
                f"layer {layer} has {q_len} queries and {kv_len} keys: routes need the run of a whole text."
            )
        if segments is not None:
            check_same_tokens(pattern, segments, f"layer {layer}", padded=True)
    lengths = {pattern.shape[-1] for pattern in run.layers.values()}
    if len(lengths) > 1:
        raise ValueError(f"the layers have {sorted(lengths)} tokens: give one run's patterns.")
    return lengths.pop() if segments is None else segments.n_tokens


def _spans(place: Place | Sequence[Place], tokens: int, segments: Segments | None, name: str) -> list[Span]:
    if isinstance(place, str):
        if segments is None:
            raise ValueError(f"{name}={place!r} is a label: give the segments that have it.")
        found = [span for label, span in zip(segments.labels, segments.token_spans, strict=True) if label == place]
        found = [span for span in found if span[0] < span[1]]
        if not found:
            raise ValueError(
                f"no segment with a token is labelled {place!r}: there are {sorted(set(segments.labels))}."
            )
        return found
    if isinstance(place, int):
        if not -tokens <= place < tokens:
            raise ValueError(f"{name} token {place} is out of range: the text has {tokens}.")
        at = place % tokens
        return [(at, at + 1)]
    if isinstance(place, tuple) and len(place) == 2 and all(isinstance(edge, int) for edge in place):
        start, stop = (edge + tokens * (edge < 0) for edge in place if isinstance(edge, int))
        if not 0 <= start < stop <= tokens:
            raise ValueError(f"{name} tokens {place} must lie in [0, {tokens}) and hold at least one.")
        return [(start, stop)]
    found = [span for each in place for span in _spans(each, tokens, segments, name)]
    if not found:
        raise ValueError(f"{name} is empty: give a token, tokens (start, stop) or a label.")
    return found


def _nodes(run: Run, tokens: int, segments: Segments | None, places: list[Span]) -> Nodes:
    if segments is not None:
        return without_empty(split_at(segment_nodes(segments), places))
    sparse = [pattern for pattern in run.layers.values() if isinstance(pattern, SparsePattern)]
    sizes = {pattern.mask.k_block for pattern in sparse}
    if len(sizes) != 1 or len(sparse) < len(run.layers):
        raise ValueError("dense patterns, or layers of different k_block, have no common blocks: give segments.")
    return split_at(block_nodes(tokens, sizes.pop()), places)


def _inside(nodes: Nodes, spans: list[Span]) -> np.ndarray:
    found = np.zeros(len(nodes), dtype=bool)
    for at, (start, stop) in enumerate(nodes.spans):
        found[at] = any(low <= start and stop <= high for low, high in spans)
    return found


def _edges(steps: Sequence[Step], edge_flow: Sequence[np.ndarray], total: float) -> pd.DataFrame:
    columns = ("query", "key", "weight", "attention", "head", "head_share")
    frame = pd.DataFrame({name: np.concatenate([getattr(step, name) for step in steps]) for name in columns})
    frame.insert(0, "step", np.repeat(range(len(steps)), [len(step.query) for step in steps]))
    frame["flow"] = np.concatenate(edge_flow) / (total or 1.0)
    return frame


def _largest(frame: pd.DataFrame, max_edges: int, paths: Sequence[list[int]], counts: Sequence[int]) -> np.ndarray:
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    on_paths = [first[number] + edge for path in paths for number, edge in enumerate(path)]
    flow = frame["flow"].to_numpy()
    return np.unique(np.concatenate([np.argsort(-flow, kind="stable")[:max_edges], np.array(on_paths, dtype=int)]))


def _route(path: list[int], weight: float, steps: Sequence[Step], layers: tuple[int, ...], total: float) -> Route:
    nodes = [int(steps[0].key[path[0]]), *(int(step.query[edge]) for step, edge in zip(steps, path, strict=True))]
    hops = tuple(
        Hop(layer, int(step.head[edge]), int(step.key[edge]), int(step.query[edge]), float(step.head_share[edge]))
        for layer, step, edge in zip(layers, steps, path, strict=True)
        if step.key[edge] != step.query[edge]
    )
    return Route(weight, weight / (total or 1.0), tuple(nodes), hops)


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])

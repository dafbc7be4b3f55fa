"""The arithmetic of routes: weights of one layer's edges, flow through them, and the strongest paths; all on arrays.

A *step* is one layer. Node j before it and node i after it are joined by a weight

    W[i, j] = (1 − residual) · A[i, j] + residual · [i = j],

A[i, j] being the share of a row of i that goes to j: attention rollout (Abnar and Zuidema, arXiv 2005.00928).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from stream_lens.circuits.span_sums import SpanSums

HeadRule = Literal["mean", "max"]


@dataclass(frozen=True, eq=False)
class Step:
    """One layer's edges, sorted by query then key.

    Attributes:
        query, key: the nodes that an edge joins: key before the layer, query after it.
        weight: W, attention and residual together.
        attention: the attention's part of it.
        head, head_share: the head that looks most along the edge, and the share of its row that does; -1 and 0 for a
            residual edge without attention.
        head_entries: (head, edge, part of `attention`), one for every head that looks along an edge.
    """

    query: Int[np.ndarray, " edge"]
    key: Int[np.ndarray, " edge"]
    weight: Float[np.ndarray, " edge"]
    attention: Float[np.ndarray, " edge"]
    head: Int[np.ndarray, " edge"]
    head_share: Float[np.ndarray, " edge"]
    head_entries: tuple[np.ndarray, np.ndarray, np.ndarray]

    def only(self, kept: Bool[np.ndarray, " edge"]) -> Step:
        """The step with some of its edges."""
        number = np.cumsum(kept) - 1
        head, edge, part = self.head_entries
        there = kept[edge]
        return Step(
            self.query[kept],
            self.key[kept],
            self.weight[kept],
            self.attention[kept],
            self.head[kept],
            self.head_share[kept],
            (head[there], number[edge[there]], part[there]),
        )


def step_of(sums: SpanSums, sizes: Int[np.ndarray, " node"], rule: HeadRule, residual: float, normalise: bool) -> Step:
    """One layer's edges from its attention between nodes; every node has a residual edge to itself."""
    count = len(sizes)
    some = sums.mass > 0
    head, query, key = sums.head[some], sums.query[some], sums.key[some]
    share = sums.mass[some] / sizes[query]
    number = np.concatenate([query * count + key, np.arange(count) * (count + 1)])
    pair, edge = np.unique(number, return_inverse=True)
    edge = edge[: len(share)]  # those of the residual stream are in `pair` only
    strongest = _strongest(edge, share, len(pair))
    looked = strongest >= 0
    best_head = np.where(looked, head[strongest], -1) if len(head) else np.full(len(pair), -1)
    best_share = np.where(looked, share[strongest], 0.0) if len(head) else np.zeros(len(pair))
    part = share / sums.n_heads
    if rule == "max":
        part = np.where(strongest[edge] == np.arange(len(share)), share, 0.0)
    query, key = np.divmod(pair, count)
    attention: np.ndarray = np.bincount(edge, weights=part, minlength=len(pair))
    if normalise:
        total = np.bincount(query, weights=attention, minlength=count)
        factor = 1 / np.where(total > 0, total, 1.0)
        attention, part = attention * factor[query], part * factor[query[edge]]
    attention, part = (1 - residual) * attention, (1 - residual) * part
    weight = attention + residual * (query == key)
    step = Step(query, key, weight, attention, best_head, best_share, (head, edge, part))
    return step.only(weight > 0)


def pruned(
    steps: Sequence[Step], source: Bool[np.ndarray, " node"], target: Bool[np.ndarray, " node"]
) -> tuple[list[Step], list[np.ndarray], list[np.ndarray]]:
    """The steps with only those edges that lie on some way from source to target; nodes reached from each end."""
    forward, backward = [source], [target]
    for step in steps:
        reached = np.zeros_like(source)
        reached[step.query[forward[-1][step.key]]] = True
        forward.append(reached)
    for step in reversed(steps):
        reached = np.zeros_like(target)
        reached[step.key[backward[-1][step.query]]] = True
        backward.append(reached)
    backward.reverse()
    kept = [
        step.only(forward[number][step.key] & backward[number + 1][step.query]) for number, step in enumerate(steps)
    ]
    return kept, forward, backward


def flows(
    steps: Sequence[Step], source: Float[np.ndarray, " node"], target: Float[np.ndarray, " node"]
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], float]:
    """Flow along every edge of every step, through every node between steps, of every head; and the total.

    The total is the rollout's share of the target that comes from the source.
    """
    before, after = [source], [target]
    for step in steps:
        before.append(np.bincount(step.query, weights=step.weight * before[-1][step.key], minlength=len(source)))
    for step in reversed(steps):
        after.append(np.bincount(step.key, weights=step.weight * after[-1][step.query], minlength=len(target)))
    after.reverse()
    edges = [
        before[number][step.key] * step.weight * after[number + 1][step.query] for number, step in enumerate(steps)
    ]
    nodes = [one * other for one, other in zip(before, after, strict=True)]
    heads = []
    for number, step in enumerate(steps):
        head, edge, part = step.head_entries
        through = before[number][step.key[edge]] * part * after[number + 1][step.query[edge]]
        heads.append(np.bincount(head, weights=through))
    return edges, nodes, heads, float(nodes[0].sum())


def strongest_paths(
    steps: Sequence[Step], source: Float[np.ndarray, " node"], target: Float[np.ndarray, " node"], count: int
) -> list[tuple[float, list[int]]]:
    """The `count` paths of the largest product of weights, end weights included: each with the edge of every step.

    Exact: the best `count` ways to each node are carried from step to step.
    """
    values: np.ndarray = np.full((len(source), count), -np.inf)
    with np.errstate(divide="ignore"):
        values[:, 0] = np.log(source)
        logs = [np.log(step.weight) for step in steps]
        ends = np.log(target)
    came_from: list[tuple[np.ndarray, np.ndarray]] = []
    for step, log in zip(steps, logs, strict=True):
        reached = (log[:, None] + values[step.key]).ravel()
        edge, rank = np.divmod(np.arange(len(reached)), count)
        there = np.isfinite(reached)
        reached, edge, rank = reached[there], edge[there], rank[there]
        order = np.lexsort((rank, step.key[edge], -reached, step.query[edge]))
        node = step.query[edge[order]]
        place = np.arange(len(node)) - np.searchsorted(node, node)
        best = place < count
        order, node, place = order[best], node[best], place[best]
        values = np.full_like(values, -np.inf)
        values[node, place] = reached[order]
        edges, ranks = np.full(values.shape, -1), np.full(values.shape, -1)
        edges[node, place], ranks[node, place] = edge[order], rank[order]
        came_from.append((edges, ranks))
    final = (values + ends[:, None]).ravel()
    found = []
    for at in np.argsort(-final, kind="stable")[:count]:
        if not np.isfinite(final[at]):
            break
        found.append((float(np.exp(final[at])), _walked_back(steps, came_from, *divmod(int(at), count))))
    return found


def _walked_back(
    steps: Sequence[Step], came_from: Sequence[tuple[np.ndarray, np.ndarray]], node: int, rank: int
) -> list[int]:
    path = []
    for step, (edges, ranks) in zip(reversed(steps), reversed(came_from), strict=True):
        edge, rank = int(edges[node, rank]), int(ranks[node, rank])
        path.append(edge)
        node = int(step.key[edge])
    return path[::-1]


def _strongest(edge: np.ndarray, share: np.ndarray, count: int) -> Int[np.ndarray, " edge"]:
    """The entry of the largest share along each edge, the first of equal ones; -1 where there is none."""
    order = np.lexsort((-np.arange(len(edge)), share, edge))
    found = np.full(count, -1)
    found[edge[order]] = order  # the last write of each edge stands
    return found

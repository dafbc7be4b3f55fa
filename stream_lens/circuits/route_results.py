"""What `routes` gives: edges, paths and flows, as tables, as a networkx graph, and as the difference of two runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float

from stream_lens.circuits.nodes import Nodes
from stream_lens.circuits.results import json_of


@dataclass(frozen=True)
class Hop:
    """One move along attention: in `layer`, mostly by `head`, from node `source` to node `target`.

    `share` is what that head gives to it of a row of the target.
    """

    layer: int
    head: int
    source: int
    target: int
    share: float


@dataclass(frozen=True)
class Route:
    """One path.

    Attributes:
        weight: product of its steps' weights, times the last node's share of the target.
        flow: weight ÷ that of all paths.
        nodes: the node before the first layer, and after each.
        hops: the steps from one node to another; all others stay in place (residual, or attention within the node).
    """

    weight: float
    flow: float
    nodes: tuple[int, ...]
    hops: tuple[Hop, ...]


@dataclass(frozen=True, eq=False)
class Routes:
    """Ways from source to target.

    Attributes:
        nodes: the spans of tokens that routes run between.
        layers: the number of the layer of each step.
        source, target: which nodes they are.
        edges: one row an edge: step, key (node before), query (node after), weight, attention (its part of weight),
            head and head_share (which head looks most along it), flow (share of all flow; a step's edges sum to 1).
        paths: the strongest, strongest first.
        flow: how much of the target comes from the source by attention rollout, 0 to 1; 0 where no way leads there.
        reached: how many nodes lie on some way, before the first layer and after each.
        node_flow: [step, node] share of the flow through each node, before the first layer and after each.
        head_flow: [step, head] share of the flow that each head carries, within nodes too; the rest is residual.
        total_edges: edges on some way from source to target; `edges` has those of the largest flow.
        heads, residual: as asked for.
        about: model, T, k and pruned share, for titles; empty where that is not known.
    """

    nodes: Nodes
    layers: tuple[int, ...]
    source: tuple[int, ...]
    target: tuple[int, ...]
    edges: pd.DataFrame
    paths: tuple[Route, ...]
    flow: float
    reached: tuple[int, ...]
    node_flow: Float[np.ndarray, "step node"]
    head_flow: Float[np.ndarray, "step head"]
    total_edges: int
    heads: str
    residual: float
    about: str = ""

    @property
    def reachable(self) -> bool:
        """Whether any way leads from source to target."""
        return self.flow > 0

    def to_frame(self) -> pd.DataFrame:
        """`edges` with layer, key_label and query_label, the largest flow first."""
        frame = self.edges.copy()
        labels = np.array(self.nodes.labels, dtype=object)
        frame.insert(1, "layer", np.array(self.layers)[frame["step"]])
        frame.insert(2, "key_label", labels[frame["key"]])
        frame.insert(3, "query_label", labels[frame["query"]])
        return frame.sort_values("flow", ascending=False, kind="stable", ignore_index=True)

    def paths_frame(self) -> pd.DataFrame:
        """One row a hop of the strongest paths: path, weight, flow, layer, head, source, target, share."""
        labels = self.nodes.labels
        rows = [
            (number, path.weight, path.flow, hop.layer, hop.head, labels[hop.source], labels[hop.target], hop.share)
            for number, path in enumerate(self.paths)
            for hop in path.hops
        ]
        return pd.DataFrame(rows, columns=["path", "weight", "flow", "layer", "head", "source", "target", "share"])

    def by_head(self) -> pd.DataFrame:
        """One row a head: layer, head, flow, largest first."""
        step, head = np.indices(self.head_flow.shape)
        frame = pd.DataFrame(
            {"layer": np.array(self.layers)[step.ravel()], "head": head.ravel(), "flow": self.head_flow.ravel()}
        )
        return frame.sort_values("flow", ascending=False, kind="stable", ignore_index=True)

    def graph(self) -> nx.DiGraph:
        """The edges as a DAG: node "step:node" is a span of tokens before step's layer; the last step is the output.

        Nodes have step, node, label, start, stop (tokens), flow and role (source, target or ""); edges layer, weight,
        attention, head, head_share, flow.
        """
        graph = nx.DiGraph(flow=self.flow, heads=self.heads, residual=self.residual)
        for row in self.edges.itertuples(index=False):
            before, after = self._add(graph, row.step, row.key), self._add(graph, row.step + 1, row.query)
            graph.add_edge(
                before,
                after,
                layer=int(self.layers[row.step]),
                weight=float(row.weight),
                attention=float(row.attention),
                head=int(row.head),
                head_share=float(row.head_share),
                flow=float(row.flow),
            )
        return graph

    def _add(self, graph: nx.DiGraph, step: int, node: int) -> str:
        name = f"{step}:{node}"
        if name not in graph:
            start, stop = self.nodes.spans[node]
            role = "source" if step == 0 else ("target" if step == len(self.layers) else "")
            label, flow = self.nodes.labels[node], float(self.node_flow[step, node])
            about = {"step": int(step), "node": int(node), "label": label, "start": int(start), "stop": int(stop)}
            graph.add_node(name, **about, flow=flow, role=role)
        return name

    def write_graph(self, path: str | PathLike[str]) -> None:
        """Write `graph` for other tools, by the file's ending: .graphml, or .json (networkx' node-link form).

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        if path.suffix == ".graphml":
            nx.write_graphml(self.graph(), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(nx.node_link_data(self.graph(), edges="edges")), encoding="utf-8")
        else:
            raise ValueError(f"{path.name}: give a name that ends in .graphml or .json.")

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.routes` of this result."""
        from stream_lens import plots

        return plots.routes(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; tables by column."""
        return json_of(self)


@dataclass(frozen=True, eq=False)
class RouteDiff:
    """Routes of a successful run − those of a failed one.

    Attributes:
        edges: one row an edge of either: layer, key_label, query_label, success, failure and difference, each the share
            of the *target* that comes along it (an edge's flow × the run's flow).
        heads: the same for each layer and head.
        success, failure: flow of each run.
    """

    edges: pd.DataFrame
    heads: pd.DataFrame
    success: float
    failure: float

    def to_frame(self) -> pd.DataFrame:
        """`edges`, the largest differences first."""
        order = np.argsort(-self.edges["difference"].abs().to_numpy(), kind="stable")
        return self.edges.iloc[order].reset_index(drop=True)

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.routes` of this result."""
        from stream_lens import plots

        return plots.routes(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; tables by column."""
        return json_of(self)


def route_diff(success: Routes, failure: Routes) -> RouteDiff:
    """Compare the routes of two runs, edge by edge; nodes are matched by their labels.

    An edge beyond a run's `max_edges` counts as 0 there, so give both enough.

    Raises:
        ValueError: other layers, heads or options; runs without a label in common.
    """
    for name in ("layers", "heads", "residual"):
        one, other = getattr(success, name), getattr(failure, name)
        if one != other:
            raise ValueError(f"the routes differ in {name}: {one} and {other}. Make both alike.")
    if not set(success.nodes.labels) & set(failure.nodes.labels):
        raise ValueError("the routes have no node label in common: make both with the same segments.")
    keys = ["layer", "key_label", "query_label"]
    edges = _difference([_weighed(run, run.to_frame(), keys) for run in (success, failure)], keys)
    heads = _difference(
        [_weighed(run, run.by_head(), ["layer", "head"]) for run in (success, failure)], ["layer", "head"]
    )
    return RouteDiff(edges, heads, success.flow, failure.flow)


def _weighed(run: Routes, frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return frame.assign(flow=frame["flow"] * run.flow).groupby(keys, as_index=False)["flow"].sum()


def _difference(frames: list[pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    one, other = (
        frame.rename(columns={"flow": name}) for frame, name in zip(frames, ("success", "failure"), strict=True)
    )
    merged = one.merge(other, on=keys, how="outer").fillna({"success": 0.0, "failure": 0.0})
    return merged.assign(difference=merged["success"] - merged["failure"])

"""Routes: the ways from source to target, layer by layer, and the difference of two runs' ways."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go

from stream_lens.circuits.route_results import RouteDiff, Routes
from stream_lens.plots.theme import COLOURS, styled, titled

_WIDTHS = (0.6, 1.5, 3.0, 5.5)


def routes(result: Routes | RouteDiff, title: str = "Routes", *, edges: int = 300, paths: int = 1) -> go.Figure:
    """Edges of the largest flow: across, where in the text; upwards, layer after layer. Thickness is flow.

    The difference of two runs is drawn as bars, one for each edge that differs most (at most 30).

    Args:
        edges: at most this many are drawn.
        paths: so many of the strongest paths are drawn on top.
    """
    return _difference(result, title) if isinstance(result, RouteDiff) else _graph(result, title, edges, paths)


def _graph(result: Routes, title: str, most: int, paths: int) -> go.Figure:
    figure = go.Figure()
    middle = np.array([(start + stop - 1) / 2 for start, stop in result.nodes.spans])
    frame = result.to_frame().head(most)
    for residual, colour, name in ((True, "grey", "stays in place"), (False, "blue", "attention")):
        part = frame[(frame["key"] == frame["query"]) == residual]
        rank = np.searchsorted([0.003, 0.03, 0.2], part["flow"].to_numpy())
        for number, width in enumerate(_WIDTHS):
            here = part[rank == number]
            _lines(figure, here, middle, width, COLOURS[colour], name)
    _edge_hovers(figure, frame, middle)
    for number, path in enumerate(result.paths[:paths]):
        figure.add_scatter(
            x=middle[list(path.nodes)],
            y=np.arange(len(path.nodes)),
            mode="lines",
            line={"color": COLOURS["orange"], "width": 2.5},
            name="strongest path" if number == 0 else f"path {number + 1}",
            hoverinfo="skip",
        )
    _nodes(figure, result, middle)
    steps = ["embeddings", *(f"after layer {layer}" for layer in result.layers)]
    figure.update_yaxes(tickvals=list(range(len(steps))), ticktext=steps, title_text="")
    figure.update_xaxes(title_text="token position", range=_around(middle))
    drawn = f"{len(frame)} of {result.total_edges} edges"
    about = f"{result.flow:.3g} of the target comes from the source; {drawn}; heads: {result.heads}"
    return styled(
        figure, f"{titled(title, result.about)}<br><sup>{about}</sup>", height=max(420, 34 * len(steps) + 200)
    )


def _lines(figure: go.Figure, part: object, middle: np.ndarray, width: float, colour: str, name: str) -> None:
    x: list[float | None] = []
    y: list[float | None] = []
    for row in part.itertuples(index=False):  # type: ignore[attr-defined]
        x += [middle[row.key], middle[row.query], None]
        y += [row.step, row.step + 1, None]
    if x:
        first = name not in [trace.name for trace in figure.data]
        line = {"width": width, "color": colour}
        figure.add_scatter(
            x=x, y=y, mode="lines", line=line, name=name, legendgroup=name, showlegend=first, hoverinfo="skip"
        )


def _edge_hovers(figure: go.Figure, frame: object, middle: np.ndarray) -> None:
    rows = list(frame.itertuples(index=False))  # type: ignore[attr-defined]
    figure.add_scatter(
        x=[(middle[row.key] + middle[row.query]) / 2 for row in rows],
        y=[row.step + 0.5 for row in rows],
        mode="markers",
        marker={"size": 9, "opacity": 0},
        showlegend=False,
        name="edges",
        text=[
            f"layer {row.layer}, mostly head {row.head} (share {row.head_share:.2g})<br>from {escape(row.key_label)}"
            f"<br>to {escape(row.query_label)}<br>flow {row.flow:.3g}, weight {row.weight:.3g}"
            for row in rows
        ],
        hovertemplate="%{text}<extra></extra>",
    )


def _nodes(figure: go.Figure, result: Routes, middle: np.ndarray) -> None:
    step, node = np.nonzero(result.node_flow > 1e-3)
    flow = result.node_flow[step, node]
    last = len(result.layers)
    ends = np.where(step == 0, COLOURS["green"], np.where(step == last, COLOURS["red"], COLOURS["black"]))
    figure.add_scatter(
        x=middle[node],
        y=step,
        mode="markers",
        marker={"size": 4 + 14 * np.sqrt(flow), "color": ends, "line": {"width": 1, "color": "white"}},
        name="nodes",
        showlegend=False,
        text=[
            f"{escape(result.nodes.labels[j])}, tokens {result.nodes.spans[j][0]} to {result.nodes.spans[j][1]}"
            f"<br>flow {share:.3g}"
            for j, share in zip(node, flow, strict=True)
        ],
        hovertemplate="%{text}<extra></extra>",
    )


def _around(middle: np.ndarray) -> list[float]:
    room = max(1.0, 0.03 * (middle.max() - middle.min()))
    return [float(middle.min() - room), float(middle.max() + room)]


def _difference(result: RouteDiff, title: str) -> go.Figure:
    frame = result.to_frame().head(30).iloc[::-1]
    names = [f"L{row.layer}: {row.key_label} → {row.query_label}" for row in frame.itertuples(index=False)]
    difference = frame["difference"].to_numpy()
    figure = go.Figure(
        go.Bar(
            x=difference,
            y=[escape(name) for name in names],
            orientation="h",
            marker={"color": np.where(difference >= 0, COLOURS["blue"], COLOURS["red"])},
            customdata=frame[["success", "failure"]].to_numpy(),
            hovertemplate="%{y}<br>success %{customdata[0]:.3g}, failure %{customdata[1]:.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="success − failure, share of the target", zeroline=True)
    figure.update_yaxes(automargin=True)
    about = f"flow: success {result.success:.3g}, failure {result.failure:.3g}; blue: more in success"
    return styled(figure, f"{title}, success − failure<br><sup>{about}</sup>", height=max(360, 22 * len(frame) + 180))

"""Mask diff: which heads changed, and which blocks of one head."""

from __future__ import annotations

from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from stream_lens.circuits.mask_diff import MaskDiff
from stream_lens.plots.theme import DIVERGING, SCALE, panel_grid, styled, titled

LARGEST_SIDE = 512
_CHANGES = [DIVERGING[0], [0.5, "#D4D4D4"], DIVERGING[-1]]  # a grey that stands out from cells that neither keeps


def mask_diff(result: MaskDiff, head: tuple[int, int] | None = None, title: str = "Success − failure") -> go.Figure:
    """Without `head`: cells added and removed, and attention moved, of every head. With it: the map of one head.

    Raises:
        ValueError: `head` is a (layer, head) that the result has not.
    """
    return _heads(result, title) if head is None else _one(result, head, title)


def _heads(result: MaskDiff, title: str) -> go.Figure:
    frame = result.heads
    names = {"added": "cells added", "removed": "cells removed", "moved": "attention moved"}
    shown = {name: label for name, label in names.items() if frame[name].notna().any()}
    controls = [_control(frame, name) for name in shown]
    figure = panel_grid(
        [f"{label}<br>{control}" for label, control in zip(shown.values(), controls, strict=True)],
        len(shown),
        max(240, 22 * frame["layer"].nunique()),
        side_gap=0.09,  # room for a scale between panels
    )
    most = float(frame[["added", "removed"]].max().max()) or 1.0
    for column, name in enumerate(shown, 1):
        grid = frame.pivot(index="layer", columns="head", values=name)
        counts = name != "moved"
        highest = most if counts else float(np.nanmax(grid.to_numpy())) or 1.0
        figure.add_heatmap(
            z=grid.to_numpy(),
            x=grid.columns,
            y=[str(layer) for layer in grid.index],
            colorscale=SCALE,
            zmin=0,
            zmax=highest,
            colorbar=_bar("cells" if counts else "moved share", 0.0 if counts else 1.0),
            showscale=name in ("removed", "moved"),
            hovertemplate="layer %{y}, head %{x}: %{z:.3g}<extra>" + shown[name] + "</extra>",
            row=1,
            col=column,
        )
    _place_bars(figure, list(shown))
    figure.update_xaxes(title_text="head", showgrid=False, dtick=1 if frame["head"].nunique() <= 20 else None)
    figure.update_yaxes(type="category", showgrid=False, showticklabels=False)
    figure.update_yaxes(title_text="layer", showticklabels=True, row=1, col=1)
    pairs = f"kept cells by head, mean over {_pairs(result)}, by {result.by}"
    styled(figure, f"{titled(title, result.about)}<br><sup>{pairs}; control: random pairs of one group</sup>")
    return figure.update_layout(margin={"t": 130, "r": 90}, height=figure.layout.height + 30)


def _pairs(result: MaskDiff) -> str:
    return f"{result.pairs} pair{'s' * (result.pairs != 1)}"


def _bar(text: str, x: float) -> dict[str, object]:
    return {"title": {"text": text, "side": "right"}, "thickness": 10, "x": x}


def _place_bars(figure: go.Figure, shown: list[str]) -> None:
    """Each scale right of the panel it belongs to."""
    for number, trace in enumerate(figure.data):
        axis = figure.layout["xaxis" if number == 0 else f"xaxis{number + 1}"]
        trace.colorbar.x = axis.domain[1] + 0.005


def _control(frame: pd.DataFrame, name: str) -> str:
    own, control = frame[name].mean(), frame[f"control_{name}"].mean()
    text = f"mean {own:.3g}"
    return f"<sup>{text}, control {control:.3g}</sup>" if control == control else f"<sup>{text}, no control</sup>"


def _one(result: MaskDiff, head: tuple[int, int], title: str) -> go.Figure:
    if not ((result.heads["layer"] == head[0]) & (result.heads["head"] == head[1])).any():
        raise ValueError(f"layer {head[0]}, head {head[1]} is not in this mask diff: see its `heads`.")
    cells = result.cells
    cells = cells[(cells["layer"] == head[0]) & (cells["head"] == head[1])]
    rows, columns = len(result.query_labels), len(result.key_labels)
    each = max(1, -(-max(rows, columns) // LARGEST_SIDE))
    shape = (-(-rows // each), -(-columns // each))
    place = (cells["query"].to_numpy() // each, cells["key"].to_numpy() // each)
    added, removed, both = (np.zeros(shape) for _ in range(3))
    for image, name in ((added, "added"), (removed, "removed"), (both, "kept")):
        np.add.at(image, place, cells[name].to_numpy())
    seen = added + removed + both > 0
    share = np.divide(added - removed, added + removed + both, out=np.full(shape, np.nan), where=seen)
    queries = [escape(label) for label in result.query_labels[::each]]
    keys = [escape(label) for label in result.key_labels[::each]]
    names = [[f"{query}<br>key: {key}" for key in keys] for query in queries] if seen.size <= 10_000 else None
    where = "%{text}" if names else "query %{y}, key %{x}"
    figure = go.Figure(
        go.Heatmap(
            z=share,
            x=np.arange(shape[1]) * each,
            y=np.arange(shape[0]) * each,
            zmin=-1,
            zmax=1,
            colorscale=_CHANGES,
            customdata=np.stack([added, removed, both], -1),
            text=names,
            hoverongaps=False,
            hovertemplate=f"query: {where}<br>added %{{customdata[0]:.3g}}, removed %{{customdata[1]:.3g}}, "
            "kept %{customdata[2]:.3g}<extra></extra>",
            colorbar={
                "title": {"text": "of the cells that either keeps", "side": "right"},
                "tickvals": [-1, 0, 1],
                "ticktext": ["removed", "both", "added"],
                "thickness": 12,
            },
        )
    )
    figure.update_xaxes(title_text=f"key {result.by}")
    figure.update_yaxes(title_text=f"query {result.by}", autorange="reversed")
    figure.update_layout(plot_bgcolor="white")
    subtitle = f"layer {head[0]}, head {head[1]}; blue: success alone, red: failure alone, grey: both; {_pairs(result)}"
    return styled(figure, f"{titled(title, result.about)}<br><sup>{subtitle}</sup>", height=620)

"""One look for every picture: colours that colour-blind readers can tell apart, and figures as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from stream_lens.files import written_aside

# Okabe and Ito's palette, which stays distinct under the common colour-vision deficiencies.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "pink": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
    "grey": "#8A8A8A",
}
SEQUENCE = ("blue", "orange", "green", "pink", "sky", "red", "grey", "yellow", "black")
SCALE = "Cividis"
"""Continuous scale for masses: monotone in lightness, so that it also prints in grey."""
DIVERGING = [[0.0, COLOURS["red"]], [0.5, "#F7F7F7"], [1.0, COLOURS["blue"]]]
"""For signed differences: red removed, blue added."""


def pale(name: str, share: float = 0.35) -> str:
    """A colour of the palette, mixed with white: fills behind text."""
    parts = [int(COLOURS[name][place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in parts)


MARGIN = {"l": 70, "r": 30, "t": 100, "b": 60}


def panel_grid(
    titles: Sequence[str], columns: int, panel_height: int, *, gap: int = 95, side_gap: float = 0.09, **options: Any
) -> go.Figure:
    """A figure with one panel a title, `columns` in a row, whose panels and gaps have these heights in pixels.

    Style it with `styled(figure, title)`, which keeps the height. `options` go to plotly's `make_subplots`.
    """
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    area = panel_height * rows + gap * (rows - 1)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=list(titles),
        horizontal_spacing=side_gap,
        vertical_spacing=gap / area,
        **options,
    )
    figure.update_annotations(font_size=13)
    figure.update_layout(height=area + MARGIN["t"] + MARGIN["b"])
    return figure


def titled(title: str, about: str) -> str:
    """The title with what a result says of its run, where it says anything."""
    return f"{title}: {about}" if about else title


def styled(figure: go.Figure, title: str, *, width: int | None = None, height: int | None = None) -> go.Figure:
    """The figure with the common layout and a title. Returns the same object.

    `height` is in pixels; without one a figure of `panel_grid` keeps its own and others get 560.
    """
    figure.update_layout(
        template="plotly_white",
        title={
            "text": title,
            "font": {"size": 16},
            "x": 0.01,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 18},
            "yref": "container",
        },
        font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        colorway=[COLOURS[name] for name in SEQUENCE],
        margin=MARGIN,
        height=height or figure.layout.height or 560,
        width=width,
        hoverlabel={"align": "left"},
    )
    return figure


def write_html(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """One self-contained page, plotly included, put in place whole."""
    return written_aside(path, lambda aside: figure.write_html(str(aside), include_plotlyjs=True, full_html=True))

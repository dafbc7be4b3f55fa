"""One look for every picture: colours that colour-blind readers can tell apart, and figures as files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import plotly.graph_objects as go

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


def styled(figure: go.Figure, title: str, *, width: int | None = None, height: int = 560) -> go.Figure:
    """The figure with the common layout and a title. Returns the same object."""
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 16}, "x": 0.01, "xanchor": "left"},
        font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        colorway=[COLOURS[name] for name in SEQUENCE],
        margin={"l": 70, "r": 30, "t": 80, "b": 60},
        height=height,
        width=width,
        hoverlabel={"align": "left"},
    )
    return figure


def write_html(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """One self-contained page, plotly included, put in place whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=".html")
    os.close(handle)
    try:
        figure.write_html(aside, include_plotlyjs=True, full_html=True)
        os.chmod(aside, 0o644)
        os.replace(aside, target)
    finally:
        Path(aside).unlink(missing_ok=True)
    return target

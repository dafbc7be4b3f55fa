"""Time and memory against the length of the text, with the exponent of each line."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from stream_lens.plots.theme import COLOURS, SEQUENCE, panel_grid, styled

_COLUMNS = ("T", "seconds", "bytes", "series")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


def scaling_curve(frame: pd.DataFrame, title: str = "Time and memory against T") -> go.Figure:
    """Seconds and bytes of each series against T, both axes logarithmic: a straight line of slope 1 is linear growth.

    The legend says the slope: the exponent of T in a least-squares fit through the logarithms, from three lengths on.

    Args:
        frame: a row for each run: T (tokens), seconds, bytes (NaN where not measured) and series, such as "dense".
        title: says the model or the layer, k and the machine.

    Raises:
        ValueError: a column is missing, or there is no row.
    """
    missing = [name for name in _COLUMNS if name not in frame]
    if missing or frame.empty:
        what = f"has no column {', '.join(missing)}" if missing else "has no rows"
        raise ValueError(f"the frame {what}: give one row for each run with {', '.join(_COLUMNS)}.")
    figure = panel_grid(["time", "memory"], 2, 400, side_gap=0.12)
    for number, (name, part) in enumerate(frame.groupby("series", sort=False)):
        for column, field in enumerate(("seconds", "bytes"), 1):
            points = part[part[field] > 0].sort_values("T")
            if len(points):
                figure.add_trace(_line(points, field, str(name), number), row=1, col=column)
    lengths = sorted({int(T) for T in frame["T"]})
    named = {"tickvals": lengths, "ticktext": [_short(T) for T in lengths]} if len(lengths) <= 10 else {}
    figure.update_xaxes(type="log", title_text="T, tokens", **named)
    for column, (field, unit) in enumerate((("seconds", "s"), ("bytes", "B")), 1):
        figure.update_yaxes(type="log", row=1, col=column, **_ticks(frame[field], unit))
    starts = [figure.layout.xaxis.domain[0], figure.layout.xaxis2.domain[0]]
    inside = {"y": 0.98, "yanchor": "top", "bgcolor": "rgba(255,255,255,0.8)"}
    return styled(figure, title).update_layout(
        legend={"x": starts[0] + 0.01, **inside}, legend2={"x": starts[1] + 0.01, **inside}
    )


def slope(points: pd.DataFrame, field: str) -> float | None:
    """The exponent of T in `field`, None with fewer than three lengths."""
    if points["T"].nunique() < 3:
        return None
    return float(np.polyfit(np.log(points["T"]), np.log(points[field]), 1)[0])


def _line(points: pd.DataFrame, field: str, name: str, number: int) -> go.Scatter:
    exponent = slope(points, field)
    colour = COLOURS[SEQUENCE[number % len(SEQUENCE)]]
    return go.Scatter(
        x=points["T"],
        y=points[field],
        mode="lines+markers",
        name=name if exponent is None else f"{name}: slope {exponent:.2f}",
        legend="legend" if field == "seconds" else "legend2",
        line={"color": colour},
        marker={"color": colour, "symbol": _SYMBOLS[number % len(_SYMBOLS)], "size": 8},
        hovertemplate=f"{name}, %{{x:,}} tokens: %{{y:.4s}}{'s' if field == 'seconds' else 'B'}<extra></extra>",
    )


def _ticks(values: pd.Series, unit: str) -> dict[str, list[object]]:
    """Every power of ten, and 2 and 5 times it where there are few."""
    values = values[values > 0]
    if values.empty:
        return {}
    low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    places = [step * 10.0**power for power in np.arange(low, high + 1) for step in steps]
    return {"tickvals": places, "ticktext": [_readable(place, unit) for place in places]}


def _readable(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:g} s"
    prefix, scale = next((p, s) for p, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)) if value >= s)
    return f"{value / scale:g} {prefix}B"


def _short(tokens: int) -> str:
    if tokens % (1 << 20) == 0:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else f"{tokens:,}"

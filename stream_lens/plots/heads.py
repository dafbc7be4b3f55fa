"""Figures over heads and segments: kurtosis over layers × heads, vertical scores and thought anchors by segment."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from stream_lens.circuits.categories import CATEGORIES
from stream_lens.circuits.receiver_heads import ReceiverHeads
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.thought_anchors import ThoughtAnchors
from stream_lens.circuits.vertical_scores import VerticalScores
from stream_lens.plots.theme import COLOURS, SCALE, panel_grid, styled, titled

_UNKNOWN = "no category"
_NAMED = ("blue", "orange", "green", "pink", "sky", "red", "yellow", "black")


def kurtosis(result: ReceiverHeads, title: str = "Kurtosis of vertical scores") -> go.Figure:
    """Kurtosis of every head, [layer, head], with the receiver heads marked; white where a head has none."""
    layers = [str(layer) for layer in result.layers]
    heads = np.arange(result.kurtosis.shape[1])
    figure = go.Figure(
        go.Heatmap(
            z=result.kurtosis,
            x=heads,
            y=layers,
            colorscale=SCALE,
            hoverongaps=False,
            colorbar={"title": {"text": "kurtosis", "side": "right"}, "thickness": 12},
            hovertemplate="layer %{y}, head %{x}: %{z:.2f}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=[head for _, head in result.heads],
        y=[str(layer) for layer, _ in result.heads],
        mode="markers",
        marker={"symbol": "circle-open", "size": 12, "color": COLOURS["red"], "line": {"width": 2.5}},
        hoverinfo="skip",
        name="receiver head",
    )
    figure.update_xaxes(title_text="head", dtick=1 if len(heads) <= 20 else None, showgrid=False)
    figure.update_yaxes(title_text="layer", type="category", categoryarray=layers, showgrid=False)
    texts = len(result.by_text)
    stable = "" if result.split_half is None else f", split-half r = {result.split_half:.2f}"
    styled(
        figure,
        f"{titled(title, result.about)}<br><sup>mean over {texts} text{'s' * (texts > 1)}{stable}; "
        f"circles: the {len(result.heads)} receiver heads</sup>",
        height=max(360, 24 * len(layers) + 200),
    )
    return figure


def vertical_scores(
    result: VerticalScores,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    text: int = 0,
    title: str = "Vertical scores",
) -> go.Figure:
    """Attention that each segment gets from later ones, one panel a head, coloured by category.

    Args:
        heads: (layer, head) to draw; by default the four of the largest kurtosis in this text.
        text: which of the result's texts.

    Raises:
        ValueError: a layer or head that the result has not.
    """
    heads = _peaked(result, text) if heads is None else list(heads)
    count = result.scores[text].shape[1]
    for layer, head in heads:
        if layer not in result.layers or not 0 <= head < count:
            raise ValueError(f"layer {layer}, head {head} is not there: layers {list(result.layers)}, {count} heads.")
    figure = panel_grid([f"layer {layer}, head {head}" for layer, head in heads], 1, 170, gap=60)
    for row, (layer, head) in enumerate(heads, 1):
        values = result.scores[text][result.layers.index(layer), head]
        for bars in _bars(values, result.segments[text], legend=row == 1):
            figure.add_trace(bars, row=row, col=1)
    figure.update_yaxes(title_text="vertical score", exponentformat="e")
    figure.update_xaxes(title_text="segment", row=len(heads), col=1)
    segments = result.segments[text]
    ranks = "ranks instead of probabilities; " if result.control_depth else ""
    title = titled(title, result.about) if result.about else f"{title}, T = {segments.n_tokens}"
    return styled(
        figure,
        f"{title}, {len(segments)} segments<br><sup>{ranks}mean attention from segments at "
        f"least {result.min_distance} later; {'exact' if result.exact else 'block masses shared out by overlap'}</sup>",
    ).update_layout(barmode="overlay")


def thought_anchors(result: ThoughtAnchors, *, text: int = 0, title: str = "Thought anchors") -> go.Figure:
    """How much the receiver heads come back to each segment, coloured by category."""
    segments = result.segments[text]
    figure = go.Figure(_bars(result.scores[text], segments, legend=True))
    figure.update_xaxes(title_text="segment")
    figure.update_yaxes(title_text="mean vertical score", exponentformat="e")
    return styled(
        figure,
        f"{title}, T = {segments.n_tokens}, {len(segments)} segments<br><sup>mean over {len(result.heads)} heads</sup>",
    ).update_layout(barmode="overlay")


def _peaked(result: VerticalScores, text: int, count: int = 4) -> list[tuple[int, int]]:
    flat = np.nan_to_num(result.kurtosis()[text], nan=-np.inf)
    order = np.argsort(-flat.ravel(), kind="stable")[:count]
    return [(result.layers[at // flat.shape[1]], int(at % flat.shape[1])) for at in order]


def _bars(values: np.ndarray, segments: Segments, *, legend: bool) -> list[go.Bar]:
    """A trace for each category, so that the legend names them."""
    categories = np.array([name or _UNKNOWN for name in segments.categories], dtype=object)
    order = [name for name in (*CATEGORIES, *dict.fromkeys(categories)) if name in set(categories)]
    traces = []
    for name in dict.fromkeys(order):
        at = np.flatnonzero(categories == name)
        traces.append(
            go.Bar(
                x=at,
                y=values[at],
                width=0.9,
                name=name.replace("_", " "),
                legendgroup=name,
                showlegend=legend,
                marker={"color": _colour(name, order), "line": {"width": 0}},
                customdata=[_about(segments, int(j)) for j in at],
                hovertemplate="segment %{x}: %{y:.3g}<br>%{customdata}<extra></extra>",
            )
        )
    return traces


def _colour(name: str, order: list[str]) -> str:
    if name == _UNKNOWN:
        return COLOURS["grey"]
    known = [*CATEGORIES, *(other for other in order if other not in CATEGORIES and other != _UNKNOWN)]
    return COLOURS[_NAMED[known.index(name) % len(_NAMED)]]


def _about(segments: Segments, j: int) -> str:
    start, stop = segments.token_spans[j]
    text = segments.text_of(j).strip()
    return f"{escape(segments.labels[j])}, tokens {start} to {stop}<br>{escape(text[:90])}{'…' * (len(text) > 90)}"

"""Faithfulness of the best blocks, by how many are kept."""

from __future__ import annotations

import plotly.graph_objects as go

from stream_lens.circuits.pruning import PrunedEdges
from stream_lens.plots.theme import COLOURS, styled, titled


def pruning(result: PrunedEdges, title: str = "Blocks that keep the metric") -> go.Figure:
    """Recovered share of the metric against the number of top-scored blocks, with random blocks as a control."""
    curve = result.curve[result.curve["edges"] > 0]
    figure = go.Figure()
    figure.add_scatter(
        x=curve["edges"],
        y=curve["faithfulness"],
        mode="lines+markers",
        name="top by |score|",
        line={"color": COLOURS["blue"]},
        hovertemplate="%{x} blocks: %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=[result.edges] * len(result.random),
        y=result.random,
        mode="markers",
        name="as many random blocks",
        marker={"color": COLOURS["grey"], "symbol": "x", "size": 9},
    )
    figure.add_hline(y=result.threshold, line={"color": COLOURS["black"], "dash": "dot", "width": 1})
    figure.update_xaxes(title_text=f"blocks kept, of {result.all_edges:,}", type="log", dtick="D2")
    figure.update_yaxes(title_text="share of the metric recovered")
    share = f"{result.edges:,} blocks recover {result.faithfulness:.0%}"
    return styled(figure, f"{titled(title, result.about)}<br><sup>{share}</sup>")

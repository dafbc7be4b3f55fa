"""Retrieval scores of every head."""

from __future__ import annotations

import plotly.graph_objects as go

from stream_lens.circuits.retrieval import RetrievalScores
from stream_lens.plots.theme import SCALE, styled, titled


def retrieval(result: RetrievalScores, title: str = "Retrieval heads") -> go.Figure:
    """Share of the source that each head copies, layers by heads."""
    most = float(result.scores.max())
    figure = go.Figure(
        go.Heatmap(
            z=result.scores,
            x=list(range(result.scores.shape[1])),
            y=list(result.layers),
            zmin=0,
            zmax=most if most > 0 else 1.0,  # plotly takes a lower end only with an upper one
            colorscale=SCALE,
            colorbar={"title": {"text": "share copied", "side": "right"}, "thickness": 12},
            hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="head", type="category", showgrid=False)
    figure.update_yaxes(title_text="layer", type="category", showgrid=False)
    answered = sum(result.answered)
    return styled(
        figure, f"{titled(title, result.about)} (by {result.by}; {answered} of {result.cases} cases answered)"
    )

"""What later segments lose when attention to an earlier one is cut."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go

from stream_lens.circuits.suppression import SegmentSuppression
from stream_lens.plots.theme import SCALE, styled, titled


def suppression(result: SegmentSuppression, title: str = "Segment suppression") -> go.Figure:
    """Mean log KL as a matrix: columns the segment cut off, rows the later segment measured."""
    columns = [f"{j} {escape(result.labels[j])}" for j in result.suppressed]
    rows = [f"{i} {escape(result.labels[i])}" for i in result.affected]
    figure = go.Figure(
        go.Heatmap(
            z=np.asarray(result.log_kl).T,
            x=columns,
            y=rows,
            colorscale=SCALE,
            colorbar={"title": {"text": "log KL, nats", "side": "right"}, "thickness": 12},
            hovertemplate="cut: %{x}<br>measured: %{y}<br>mean log KL: %{z:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="segment cut off", type="category", showgrid=False)
    figure.update_yaxes(title_text="later segment", type="category", autorange="reversed", showgrid=False)
    return styled(figure, f"{titled(title, result.about)} ({result.how}, temperature {result.temperature:g})")

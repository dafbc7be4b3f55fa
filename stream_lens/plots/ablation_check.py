"""Attribution scores beside the effects of real ablations."""

from __future__ import annotations

import plotly.graph_objects as go

from stream_lens.circuits.pruning import AblationCheck
from stream_lens.plots.theme import COLOURS, styled, titled


def ablation_check(result: AblationCheck, title: str = "Attribution against ablation") -> go.Figure:
    """One dot an ablated block: its score, and what the metric lost without it. On the line both are equal."""
    table = result.table
    ends = [float(table[["score", "effect"]].min().min()), float(table[["score", "effect"]].max().max())]
    figure = go.Figure(
        [
            go.Scatter(
                x=ends,
                y=ends,
                mode="lines",
                line={"color": COLOURS["grey"], "width": 1},
                hoverinfo="skip",
                showlegend=False,
            ),
            go.Scatter(
                x=table["score"],
                y=table["effect"],
                mode="markers",
                marker={"color": COLOURS["blue"], "size": 7, "opacity": 0.7},
                customdata=table[["layer", "head", "q_block", "k_block"]],
                hovertemplate=(
                    "layer %{customdata[0]}, head %{customdata[1]}, query block %{customdata[2]}, key block "
                    "%{customdata[3]}: score %{x:.3g}, effect %{y:.3g}<extra></extra>"
                ),
                showlegend=False,
            ),
        ]
    )
    figure.update_xaxes(title_text="score (gradient × gate)")
    figure.update_yaxes(title_text="effect (metric lost without the block)")
    agreement = f"Pearson {result.pearson:.2f}, Spearman {result.spearman:.2f}, n = {result.n} blocks"
    return styled(
        figure, f"{titled(title, result.about)}<br><sup>{agreement} ({result.sample.replace('_', ' ')})</sup>"
    )

"""Figures about budgets and causes: minimal k, attribution of blocks, ablation."""

from __future__ import annotations

from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from stream_lens.circuits.ablation import AblationEffects
from stream_lens.circuits.attribution import GateAttribution
from stream_lens.circuits.head_controls import HeadsAgainstRandom
from stream_lens.circuits.minimal_k import MinimalK
from stream_lens.plots.theme import COLOURS, DIVERGING, SCALE, panel_grid, styled, titled


def minimal_k(result: MinimalK, title: str = "Minimal k") -> go.Figure:
    """KL of every k tried for the whole model, and whether the answer was kept; budgets of heads beside it."""
    frame = result.to_frame()
    whole = frame[frame["layer"].isna() & frame["head"].isna()].sort_values("k")
    budgets = result.budgets_frame()
    panels = ["runs of the whole model", "k of each head"][: 1 if budgets.empty else 2]
    figure = panel_grid(panels, 2, 360, side_gap=0.12)
    figure.add_scatter(
        x=whole["k"], y=whole["kl"], mode="lines", line={"color": COLOURS["grey"], "width": 1}, hoverinfo="skip",
        showlegend=False, row=1, col=1,
    )  # fmt: skip
    for passed, name, colour, symbol in (
        (True, "answer kept", "blue", "circle"),
        (False, "answer lost", "red", "x"),
    ):
        part = whole[whole["passed"] == passed]
        figure.add_scatter(
            x=part["k"],
            y=part["kl"],
            mode="markers",
            name=name,
            marker={"color": COLOURS[colour], "symbol": symbol, "size": 10},
            cliponaxis=False,
            customdata=part[["matched", "logit_difference"]].to_numpy(),
            hovertemplate="k = %{x}: KL %{y:.3g} nats<br>%{customdata[0]} tokens kept, logit difference "
            "%{customdata[1]:.3g}<extra></extra>",
            row=1,
            col=1,
        )
    figure.add_vline(x=result.k, line={"color": COLOURS["black"], "dash": "dot", "width": 1}, row=1, col=1)
    figure.update_xaxes(title_text="k, key blocks per query block", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="KL(dense ‖ sparse), nats", rangemode="tozero", row=1, col=1)
    if not budgets.empty:
        grid = budgets.pivot(index="layer", columns="head", values="k")
        figure.add_heatmap(
            z=grid.to_numpy(),
            x=grid.columns,
            y=[str(layer) for layer in grid.index],
            colorscale=SCALE,
            colorbar={"title": {"text": "k", "side": "right"}, "thickness": 12},
            hovertemplate="layer %{y}, head %{x}: k = %{z}<extra></extra>",
            row=1,
            col=2,
        )
        figure.update_xaxes(title_text="head", dtick=1 if grid.shape[1] <= 20 else None, row=1, col=2)
        figure.update_yaxes(title_text="layer", type="category", row=1, col=2)
        figure.update_layout(legend={"orientation": "h", "y": -0.2})
    below = "k − 1 loses the answer" if result.fails_below else "k − 1 was not tried"
    sizes = f"T = {result.n_tokens:,}, blocks of {result.config.q_block} × {result.config.k_block}"
    about = f"{sizes}; {result.kept_fraction:.1%} of the last row's keys; {below}; {result.passes} forwards"
    return styled(figure, f"{titled(f'{title} = {result.k}', result.about)}<br><sup>{about}</sup>")


def attribution(result: GateAttribution, title: str = "Gate attribution", *, top: int = 20) -> go.Figure:
    """Summed score of every head, and the blocks of the largest |score|: blue raises the metric, red lowers it."""
    heads = result.per_head().pivot(index="layer", columns="head", values="score")
    edges = result.top_edges(top).iloc[::-1]
    figure = panel_grid(
        ["by head, summed over blocks", f"the {len(edges)} largest blocks"],
        2,
        max(340, 20 * max(len(edges), len(heads))),
        side_gap=0.28,
    )
    most = float(np.abs(heads.to_numpy()).max()) or 1.0
    figure.add_heatmap(
        z=heads.to_numpy(),
        x=heads.columns,
        y=[str(layer) for layer in heads.index],
        zmin=-most,
        zmax=most,
        colorscale=DIVERGING,
        colorbar={"title": {"text": "score", "side": "right"}, "thickness": 10, "x": 0.37},
        hovertemplate="layer %{y}, head %{x}: %{z:.3g}<extra></extra>",
        row=1,
        col=1,
    )
    figure.add_bar(
        x=edges["score"],
        y=[_edge_name(row, result) for row in edges.to_dict("records")],
        orientation="h",
        marker={"color": np.where(edges["score"] >= 0, COLOURS["blue"], COLOURS["red"])},
        hovertemplate="%{y}: %{x:.3g}<extra></extra>",
        showlegend=False,
        row=1,
        col=2,
    )
    figure.update_xaxes(title_text="head", showgrid=False, dtick=1 if heads.shape[1] <= 20 else None, row=1, col=1)
    figure.update_yaxes(title_text="layer", type="category", showgrid=False, row=1, col=1)
    figure.update_xaxes(title_text="score", row=1, col=2)
    figure.update_yaxes(tickfont={"size": 11}, type="category", row=1, col=2)
    mask = next(iter(result.masks.values()))
    how = "gradient at gate 1" if result.steps == 1 else f"mean gradient at {result.steps} points"
    about = f"T = {mask.kv_len}, metric {result.value:.3g}; {how}; q and k name query and key blocks"
    return styled(figure, f"{titled(title, result.about)}<br><sup>{about}</sup>")


def _edge_name(row: dict[str, int], result: GateAttribution) -> str:
    text = f"L{row['layer']}H{row['head']} q{row['q_block']} ← k{row['k_block']}"
    several = result.masks[row["layer"]].shape[0] > 1
    return f"{text} (text {row['batch']})" if several else text


def ablation(result: AblationEffects | HeadsAgainstRandom, title: str = "Ablation") -> go.Figure:
    """What the metric loses: a bar for each ablation; or chosen heads beside as many random ones, with their mean."""
    return (
        _control(result, title)
        if isinstance(result, HeadsAgainstRandom)
        else _effects(result.to_frame(), result, title)
    )


def _effects(frame: pd.DataFrame, result: AblationEffects, title: str) -> go.Figure:
    frame = frame.iloc[::-1]
    figure = go.Figure(
        go.Bar(
            x=frame["effect"],
            y=[escape(str(name)) for name in frame["name"]],
            orientation="h",
            marker={"color": np.where(frame["effect"] >= 0, COLOURS["blue"], COLOURS["red"])},
            customdata=frame[["value", "blocks"]].to_numpy(),
            hovertemplate="%{y}: effect %{x:.3g}<br>metric %{customdata[0]:.3g}, %{customdata[1]:,} blocks taken out"
            "<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="effect: metric lost", zeroline=True)
    figure.update_yaxes(automargin=True, type="category")
    how = "dropped (rows renormalise)" if result.how == "drop" else "zeroed (nothing renormalises)"
    about = f"metric without any: {result.base:.3g}; blocks are {how}"
    return styled(
        figure, f"{titled(title, result.about)}<br><sup>{about}</sup>", height=max(320, 32 * len(frame) + 190)
    )


def _control(result: HeadsAgainstRandom, title: str) -> go.Figure:
    low, high = result.interval
    figure = go.Figure()
    figure.add_scatter(
        x=list(result.random_effects), y=["random heads"] * len(result.random_effects), mode="markers",
        marker={"color": COLOURS["grey"], "size": 9, "opacity": 0.7}, name="a random set",
        hovertemplate="effect %{x:.3g}<extra></extra>",
    )  # fmt: skip
    known = low == low
    error = {"array": [high - result.random_mean], "arrayminus": [result.random_mean - low]} if known else None
    figure.add_scatter(
        x=[result.random_mean], y=["random heads"], mode="markers", name="their mean", error_x=error,
        marker={"color": COLOURS["black"], "symbol": "line-ns-open", "size": 18, "line": {"width": 3}},
    )  # fmt: skip
    figure.add_scatter(
        x=[result.effect], y=["chosen heads"], mode="markers", name="chosen heads",
        marker={"color": COLOURS["blue"], "symbol": "diamond", "size": 13},
    )  # fmt: skip
    figure.update_xaxes(title_text="effect: metric lost", zeroline=True)
    figure.update_yaxes(type="category", categoryarray=["random heads", "chosen heads"], range=[-0.6, 1.6])
    interval = f"; bar: {result.confidence:.0%} interval of the mean" if known else ""
    count = len(result.random_effects)
    about = f"{len(result.heads)} heads, {result.inputs} inputs, {count} random sets{interval}"
    return styled(
        figure, f"{titled(title, result.about)}; chosen against random heads<br><sup>{about}</sup>", height=330
    )

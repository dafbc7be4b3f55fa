"""Needle success: length × depth, one panel a selector and budget, with the number of cases in every cell."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from stream_lens.plots.theme import SCALE, pale, panel_grid, styled


class Table(Protocol):
    """What `NeedleTable` has of interest here."""

    def to_frame(self) -> pd.DataFrame: ...


def needle_heatmap(table: Table, title: str = "Needles found") -> go.Figure:
    """Success by length and depth: a row of panels for each selector, a column for each budget.

    A cell says the share of the cases that dense answers, and how many those are (n). Cells where dense fails every
    case are grey and say so; cases left out of other cells are named on hover and counted in the title.

    Args:
        table: of `stream_lens.tasks.needle_study.needle_table`.
        title: its first words; the counts follow.

    Raises:
        ValueError: the table has no rows.
    """
    frame = table.to_frame()
    if frame.empty:
        raise ValueError("the needle table has no rows: give needle_table a sweep with at least one budget.")
    frame = frame.assign(budget=[budget_label(row) for row in frame.to_dict("records")])
    selectors, budgets = list(dict.fromkeys(frame.selector)), list(dict.fromkeys(frame.budget))
    lengths, depths = sorted(frame.length.unique()), sorted(frame.depth.unique())
    parts = dict(iter(frame.groupby(["selector", "budget"])))
    panels = [(selector, budget) for selector in selectors for budget in budgets]
    figure = panel_grid(
        [_panel_title(*panel, parts.get(panel)) for panel in panels],
        len(budgets),
        max(120, 46 * len(depths)),
        gap=70,
        side_gap=0.12 / len(budgets),
        shared_yaxes=True,
    )
    for number, panel in enumerate(panels):
        place = {"row": number // len(budgets) + 1, "col": number % len(budgets) + 1}
        if panel in parts:
            for trace in _cells(parts[panel], lengths, depths):
                figure.add_trace(trace, **place)
        figure.update_xaxes(
            type="category", title_text="prompt, tokens" if place["row"] == len(selectors) else "", **place
        )
        figure.update_yaxes(type="category", autorange="reversed", **place)
        figure.update_yaxes(title_text="needle depth" if place["col"] == 1 else "", **place)
    figure.update_xaxes(showgrid=False, categoryarray=[f"{n:,}" for n in lengths])
    figure.update_yaxes(showgrid=False, categoryarray=[_percent(depth) for depth in depths])
    figure.update_layout(
        coloraxis={
            "colorscale": SCALE,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"title": {"text": "found", "side": "right"}, "tickformat": ".0%", "thickness": 12},
        }
    )
    return styled(figure, f"{title}<br><sup>{_counts(frame)}</sup>")


def _cells(part: pd.DataFrame, lengths: list[Any], depths: list[Any]) -> list[go.Heatmap]:
    def grid(column: str) -> np.ndarray:
        return part.pivot(index="depth", columns="length", values=column).reindex(depths, columns=lengths).to_numpy()

    success, n, failed, all_found, n_all = map(grid, ("success", "n", "dense_failed", "successes_all", "n_all"))
    x, y = [f"{length:,}" for length in lengths], [_percent(depth) for depth in depths]
    hover = "%{x} tokens, depth %{y}<br>"
    counted = go.Heatmap(
        z=np.where(n > 0, success, np.nan),
        x=x,
        y=y,
        coloraxis="coloraxis",
        text=_texts(n > 0, lambda i, j: f"{success[i, j]:.0%}<br>n = {n[i, j]:.0f}"),
        texttemplate="%{text}",
        customdata=np.stack([n, failed, all_found, n_all], -1),
        hovertemplate=hover
        + "found %{z:.0%} of the %{customdata[0]} cases that dense finds<br>%{customdata[1]} left out (dense fails); "
        "with those: %{customdata[2]} of %{customdata[3]}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
    )
    none = n == 0
    excluded = go.Heatmap(
        z=np.where(none, 1.0, np.nan),
        x=x,
        y=y,
        colorscale=[[0, pale("grey")], [1, pale("grey")]],
        showscale=False,
        text=_texts(none, lambda i, j: f"dense fails<br>{failed[i, j]:.0f} of {n_all[i, j]:.0f}"),
        texttemplate="%{text}",
        textfont={"color": "#333333"},
        hovertemplate=hover + "%{text}: no case to judge by<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
    )
    return [counted, excluded]


def _texts(where: np.ndarray, text: Any) -> list[list[str]]:
    rows, columns = where.shape
    return [[text(i, j) if where[i, j] else "" for j in range(columns)] for i in range(rows)]


def budget_label(row: dict[str, Any]) -> str:
    """What a row of a needle table may keep: its `k`, or its `fraction` where that is missing."""
    return (
        f"{_percent(row['fraction'])} of prefix" if row["k"] is None or row["k"] != row["k"] else f"k = {row['k']:.0f}"
    )


def _percent(share: float) -> str:
    """With as many digits as tell neighbours apart: 2%, 2.5%, 33.33%."""
    return f"{100 * share:.4g}%"


def _panel_title(selector: str, budget: str, part: pd.DataFrame | None) -> str:
    if part is None:
        return f"{selector}, {budget}: not run"
    return f"{selector}, {budget} ({part.pruned_global.mean():.1%} pruned)"


def _counts(frame: pd.DataFrame) -> str:
    cases = frame.drop_duplicates(["length", "depth"])
    failed, total = int(cases.dense_failed.sum()), int(cases.n_all.sum())
    return (
        f"share of the cases that dense finds; dense fails {failed} of {total} cases, which are left out; "
        "pruned: of the causal half, layers without a window"
    )

"""Pictures of block masks: which key blocks each query block keeps, and the attention mass they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from stream_lens.blocks import BlockMask, FractionOfPrefix, MassThreshold, StreamConfig
from stream_lens.plots.theme import COLOURS, SCALE, panel_grid, styled

Span = tuple[int, int]
LARGEST_SIDE = 512
"""Cells along a side of one picture; longer texts are drawn by adding up neighbouring blocks."""
LEAST_SHARE = 1e-4
"""Shares of a query's attention below this look alike."""


def mask_image(
    mask: BlockMask,
    mass: Float[Tensor, "batch head q_blocks k"] | None,
    *,
    head: int,
    batch: int = 0,
    largest: int = LARGEST_SIDE,
) -> tuple[np.ndarray, int, int]:
    """One head's mask as an image: NaN where nothing is kept, else the mean share of a row's attention.

    Without `mass` the value is the share of kept blocks in the cell. Returns the image [rows, columns] and how many
    tokens a row and a column stand for. O(q_blocks · k), never q_blocks × k_blocks beyond `largest` a side.
    """
    indices = mask.indices[batch, head].cpu().long()
    rows_each = -(-mask.q_blocks // largest)
    columns_each = -(-mask.k_blocks // largest)
    shape = (-(-mask.q_blocks // rows_each), -(-mask.k_blocks // columns_each))
    row = torch.arange(mask.q_blocks)[:, None].expand_as(indices) // rows_each
    kept = indices >= 0
    cell = (row * shape[1] + indices.clamp(min=0) // columns_each)[kept]
    count = torch.zeros(shape[0] * shape[1]).index_add_(0, cell, torch.ones(len(cell)))
    if mass is None:
        value = count / (rows_each * columns_each)
    else:
        # The last query block may be short, so each row of the image is divided by the queries that it really holds.
        first = torch.arange(shape[0]) * rows_each * mask.q_block
        queries = (first + rows_each * mask.q_block).clamp(max=mask.q_len) - first
        summed = mass[batch, head].detach().cpu().float()[kept]
        value = torch.zeros(len(count)).index_add_(0, cell, summed) / queries.repeat_interleave(shape[1])
    image = torch.where(count > 0, value, torch.nan).view(shape).numpy()
    return image, rows_each * mask.q_block, columns_each * mask.k_block


def mask_figure(
    panels: Sequence[tuple[str, BlockMask, Float[Tensor, "batch head q_blocks k"] | None, int]],
    title: str,
    *,
    spans: Mapping[str, Span] | None = None,
    columns: int = 2,
    panel_height: int = 400,
) -> go.Figure:
    """A picture with one panel for each (name, mask, block mass, head).

    All panels together have at most twice the cells of one of `LARGEST_SIDE`, so that a page of many stays light.

    Args:
        panels: what to draw; the mass may be None.
        title: says model, T, k and pruned share.
        spans: token spans to mark along both axes, by name.
        columns: panels in a row.
        panel_height: pixels.
    """
    if not panels:
        raise ValueError("give at least one panel to draw.")
    figure = panel_grid([name for name, *_ in panels], columns, panel_height)
    columns = min(columns, len(panels))
    largest = min(LARGEST_SIDE, int(LARGEST_SIDE * (2 / len(panels)) ** 0.5))
    for number, (_, mask, mass, head) in enumerate(panels):
        row, column = number // columns + 1, number % columns + 1
        figure.add_trace(_heatmap(mask, mass, head, largest, show_scale=number == 0), row=row, col=column)
        _mark_spans(figure, mask, spans or {}, row, column)
        figure.update_xaxes(title_text="key token", range=[0, mask.kv_len], row=row, col=column)
        figure.update_yaxes(
            title_text="query token",
            range=[mask.offset + mask.q_len, mask.offset],
            row=row,
            col=column,
        )
    return styled(figure, title)


def shown_share(image: np.ndarray) -> np.ndarray:
    """Shares as the pictures colour them: their decimal logarithm, from `LEAST_SHARE` up; NaN stays NaN."""
    return np.log10(np.maximum(image, LEAST_SHARE))


def share_axis(what: str) -> dict[str, Any]:
    """A plotly colour axis for `shown_share`, labelled in shares."""
    return {
        "cmin": -4,
        "cmax": 0,
        "colorscale": SCALE,
        "colorbar": {
            "title": {"text": what, "side": "right"},
            "tickvals": [-4, -3, -2, -1, 0],
            "ticktext": ["≤ 0.0001", "0.001", "0.01", "0.1", "1"],
            "thickness": 12,
        },
    }


def config_text(config: StreamConfig | None) -> str:
    """What a run kept, for titles: k or its schedule, and the sizes of blocks."""
    if config is None:
        return "k unknown"
    match config.k:
        case FractionOfPrefix(fraction, minimum):
            kept = f"k = {fraction:.3g} of the prefix, {minimum} or more"
        case MassThreshold(mass, maximum):
            kept = f"k = {mass:.3g} of the mass, {maximum} or fewer"
        case k:
            kept = f"k = {k}"
    return f"{kept}, blocks of {config.q_block} × {config.k_block}"


def _heatmap(mask: BlockMask, mass: Tensor | None, head: int, largest: int, *, show_scale: bool) -> go.Heatmap:
    image, row_tokens, column_tokens = mask_image(mask, mass, head=head, largest=largest)
    what = "share of a row" if mass is not None else "share of blocks kept"
    axis = share_axis(what)
    return image_trace(
        shown_share(image),
        image,
        mask.offset,
        row_tokens,
        column_tokens,
        what,
        zmin=axis["cmin"],
        zmax=axis["cmax"],
        colorscale=axis["colorscale"],
        showscale=show_scale,
        colorbar=axis["colorbar"],
    )


def image_trace(
    z: Float[np.ndarray, "rows columns"],
    image: Float[np.ndarray, "rows columns"],
    offset: int,
    row_tokens: int,
    column_tokens: int,
    what: str,
    **options: Any,
) -> go.Heatmap:
    """An image over query and key positions, coloured by `z`; hovering says `what` the image's own value is.

    A row and a column stand for so many tokens; the first query is at position `offset`. `options` go to plotly.
    """
    return go.Heatmap(
        z=z,
        x=(np.arange(image.shape[1]) + 0.5) * column_tokens,
        y=offset + (np.arange(image.shape[0]) + 0.5) * row_tokens,
        customdata=image,
        hovertemplate=(
            f"queries %{{y:.0f}} ± {row_tokens / 2:g}<br>keys %{{x:.0f}} ± {column_tokens / 2:g}"
            f"<br>{what}: %{{customdata:.3g}}<extra></extra>"
        ),
        **options,
    )


def _mark_spans(figure: go.Figure, mask: BlockMask, spans: Mapping[str, Span], row: int, column: int) -> None:
    colours = [COLOURS["red"], COLOURS["blue"], COLOURS["green"], COLOURS["pink"]]
    for number, (name, (start, stop)) in enumerate(spans.items()):
        colour = colours[number % len(colours)]
        line = {"width": 0, "color": colour}
        # A span of few tokens would be thinner than a pixel, so the band is at least a three-hundredth of the axis.
        least = -(-mask.kv_len // 300)
        stop = max(stop, start + least)
        named: dict[str, object] = (
            {} if (row, column) != (1, 1) else {"annotation_text": name, "annotation_position": "top right"}
        )
        if named:
            named["annotation_font"] = {"color": colour, "size": 12}
        figure.add_vrect(x0=start, x1=stop, fillcolor=colour, opacity=0.35, line=line, row=row, col=column, **named)
        if mask.offset <= start < mask.offset + mask.q_len:
            figure.add_hrect(y0=start, y1=stop, fillcolor=colour, opacity=0.2, line=line, row=row, col=column)

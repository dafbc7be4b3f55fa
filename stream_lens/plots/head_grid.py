"""All heads of a run at once: a small mask of each, layers across and heads down."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from stream_lens.backend import SparseActivationCache, SparsePattern
from stream_lens.circuits.runs import mean_pruned
from stream_lens.plots.masks import config_text, mask_image, share_axis, shown_share
from stream_lens.plots.theme import COLOURS, MARGIN, styled

MOST_CELLS = 300_000
"""Image cells of all heads together: a page of this many weighs about two megabytes beside plotly itself."""
_FILLED = 0.92  # of a head's unit square, the rest parts it from its neighbours


def head_grid(
    cache: SparseActivationCache, title: str = "Kept key blocks of every head", *, batch: int = 0
) -> go.Figure:
    """A small mask for each head, coloured by the mean share of a query's attention; drag to zoom into some.

    Each is drawn by adding up neighbouring blocks, to at most 64 × 64 cells and `MOST_CELLS` in all, so the figure
    weighs the same however long the text is.

    Args:
        cache: of a streamed run.
        title: its first words; model, T, k and the pruned share follow.
        batch: which text.

    Raises:
        ValueError: the cache has no sparse patterns.
        NoScoresError: a pattern's masses are not known (`SparsePattern.block_mass`).
    """
    patterns = cache.patterns()
    if not patterns:
        raise ValueError("this cache has no sparse patterns: let names_filter pass 'hook_pattern'.")
    masks = [pattern.mask for pattern in patterns.values()]
    side = int(np.clip((MOST_CELLS / sum(mask.shape[1] for mask in masks)) ** 0.5, 16, 64))
    figure = go.Figure()
    for place, (layer, pattern) in enumerate(patterns.items()):
        mass = pattern.block_mass.reshape(pattern.mask.indices.shape)
        for head in range(pattern.mask.shape[1]):
            figure.add_trace(_small(pattern, mass, place, layer, head, batch, side))
    figure.add_trace(_frames([mask.shape[1] for mask in masks]))
    pruned = mean_pruned(masks, "causal")
    about = f"T = {masks[0].kv_len:,}, {config_text(cache.info.config)}; {pruned:.1%} of the causal half pruned"
    styled(figure, f"{title}: {cache.info.model_name}<br><sup>{about}; down: queries, across: keys</sup>")
    return _sized(figure, list(patterns), [mask.window for mask in masks], max(mask.shape[1] for mask in masks))


def _small(
    pattern: SparsePattern,
    mass: Float[Tensor, "batch head q_blocks k"],
    place: int,
    layer: int,
    head: int,
    batch: int,
    side: int,
) -> go.Heatmap:
    mask = pattern.mask
    image, _, _ = mask_image(mask, mass, head=head, batch=batch, largest=side)
    own = mask.select(batch=slice(batch, batch + 1), heads=[head])
    where = "global" if mask.window is None else f"window {mask.window}, {own.sparsity('visible'):.1%} of it pruned"
    height, width = _FILLED / image.shape[0], _FILLED / image.shape[1]
    return go.Heatmap(
        z=shown_share(image),
        x0=place - _FILLED / 2 + width / 2,
        dx=width,
        y0=head - _FILLED / 2 + height / 2,
        dy=height,
        coloraxis="coloraxis",
        name=f"L{layer}H{head}",
        hovertemplate=(
            f"layer {layer}, head {head} ({where})<br>k = {mask.k}, {own.sparsity('causal'):.1%} of the causal half "
            "pruned<extra></extra>"
        ),
    )


def _frames(heads: list[int]) -> go.Scatter:
    edge = _FILLED / 2
    x: list[float | None] = []
    y: list[float | None] = []
    for place, count in enumerate(heads):
        for head in range(count):
            x += [place - edge, place + edge, place + edge, place - edge, place - edge, None]
            y += [head - edge, head - edge, head + edge, head + edge, head - edge, None]
    line = {"color": COLOURS["grey"], "width": 0.5}
    return go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False, name="frames")


def _sized(figure: go.Figure, layers: list[int], windows: list[int | None], heads: int) -> go.Figure:
    """Axes named by layer and head, and squares about as wide as they are high."""
    mixed = len({window is None for window in windows}) == 2
    names = [
        f"<b>{layer}</b>" if mixed and window is None else str(layer)
        for layer, window in zip(layers, windows, strict=True)
    ]
    each = float(np.clip(1150 / len(layers), 34, 120))
    figure.update_xaxes(
        title_text="layer (bold: no window)" if mixed else "layer",
        tickvals=list(range(len(layers))),
        ticktext=names,
        range=[-0.5, len(layers) - 0.5],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title_text="head",
        tickvals=list(range(heads)),
        range=[heads - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return figure.update_layout(
        coloraxis=share_axis("share of a query"),
        width=round(each * len(layers)) + MARGIN["l"] + MARGIN["r"] + 70,
        height=max(330, round(each * heads) + MARGIN["t"] + MARGIN["b"]),
    )

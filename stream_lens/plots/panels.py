"""One head at several lengths: dense attention, its means over blocks, the Stream mask, and the mass in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float

from stream_lens.backend import SparseActivationCache, SparsePattern
from stream_lens.plots.masks import config_text, image_trace, mask_image, share_axis, shown_share
from stream_lens.plots.theme import COLOURS, pale, panel_grid, styled

LONGEST_DENSE = 8192
"""Tokens of the longest text whose dense attention is drawn: its time grows with T², and no picture shows more."""
_SIDE = 256  # cells along a side of a panel, about its pixels
_ROWS = 128  # query rows of dense attention that exist at once


def four_panels(
    caches: Sequence[SparseActivationCache],
    layer: int,
    head: int,
    title: str = "Dense and Stream attention",
    *,
    batch: int = 0,
) -> go.Figure:
    """Dense, block-mean, Stream mask and Stream mass of one head, a row for each cache.

    Dense attention is made again from the queries and keys that the pattern holds, a few rows at a time: what this
    head would attend to in the same run without a mask. Cache runs with `observe=True` for the dense model's own.
    Colours are the mean share of a query's attention in a cell; the block-mean is that of a whole block, which is the
    mean probability times the keys in the block.

    Args:
        caches: runs of texts of several lengths, shortest first.
        layer, head: which head.
        title: its first words; model, layer, head and k follow. Panels say T and the pruned share.
        batch: which text.

    Raises:
        ValueError: no cache, no such layer or head, or a text longer than `LONGEST_DENSE`.
        NoScoresError: a pattern was cached with keep_scores=False.
    """
    if not caches:
        raise ValueError("give at least one cache to draw.")
    patterns = [_pattern(cache, layer, head) for cache in caches]
    titles = []
    for pattern in patterns:
        own = pattern.mask.select(batch=slice(batch, batch + 1), heads=[head])
        names = ("dense", "block-mean of dense", f"Stream mask, {own.sparsity('causal'):.1%} pruned", "Stream mass")
        titles += [f"T = {own.kv_len:,}: {name}" for name in names]
    figure = panel_grid(titles, 4, 250, gap=70, side_gap=0.035)
    for row, pattern in enumerate(patterns, 1):
        for column, trace in enumerate(_panels(pattern, head, batch), 1):
            figure.add_trace(trace, row=row, col=column)
            mask = pattern.mask
            figure.update_xaxes(range=[0, mask.kv_len], row=row, col=column)
            figure.update_yaxes(
                range=[mask.offset + mask.q_len, mask.offset], showticklabels=column == 1, row=row, col=column
            )
        figure.update_yaxes(title_text="query token", row=row, col=1)
    figure.update_xaxes(title_text="key token", row=len(patterns))
    figure.update_xaxes(showgrid=False, nticks=5).update_yaxes(showgrid=False, nticks=6)
    info = caches[0].info
    window = patterns[0].mask.window
    kind = "global" if window is None else f"window {window}"
    about = f"{config_text(info.config)}; pruned: of the causal half; colour: share of a query's attention in a cell"
    styled(figure, f"{title}: {info.model_name}, layer {layer}, head {head} ({kind})<br><sup>{about}</sup>")
    return figure.update_annotations(font_size=12).update_layout(coloraxis=share_axis("share of a query"))


def dense_image(
    pattern: SparsePattern, *, head: int, row_tokens: int, column_tokens: int, batch: int = 0
) -> Float[np.ndarray, "rows columns"]:
    """Dense attention of one head as an image: the mean over a cell's queries of the attention that its keys get.

    O(T²) time, but never more than 128 rows of T probabilities at once. NaN where no query sees a key.

    Raises:
        ValueError: the text is longer than `LONGEST_DENSE`.
        NoScoresError: the pattern was cached with keep_scores=False.
    """
    if pattern.mask.kv_len > LONGEST_DENSE:
        raise ValueError(
            f"dense attention of {pattern.mask.kv_len:,} tokens is not drawn: the most is {LONGEST_DENSE:,}; draw the "
            "mask alone with mask_figure, or trace a shorter text."
        )
    places = {0: batch, 1: head}
    one = pattern[tuple(slice(places[axis], places[axis] + 1) for axis in pattern.data_.present if axis in places)]
    mask = one.mask
    last_row = (torch.arange(1, mask.q_blocks + 1) * mask.q_block).clamp(max=mask.q_len) - 1
    block = torch.arange(mask.k_blocks)
    seen = block <= (mask.offset + last_row[:, None]) // mask.k_block
    every = replace(mask, indices=torch.where(seen, block, -1).int()[None, None].to(mask.indices.device))
    dense = one.with_mask(every)
    shape = (-(-mask.q_len // row_tokens), -(-mask.kv_len // column_tokens))
    image = torch.zeros(shape)
    for start in range(0, mask.q_len, _ROWS):
        rows = dense.to_dense(rows=slice(start, min(start + _ROWS, mask.q_len))).detach().cpu().float()
        rows = rows.reshape(-1, mask.kv_len)
        rows = torch.nn.functional.pad(rows, (0, -mask.kv_len % column_tokens))
        sums = rows.reshape(len(rows), shape[1], column_tokens).sum(-1)
        image.index_add_(0, torch.arange(start, start + len(rows)) // row_tokens, sums)
    first = torch.arange(shape[0]) * row_tokens
    last = (first + row_tokens).clamp(max=mask.q_len)
    image /= (last - first)[:, None]
    hidden = torch.arange(shape[1]) * column_tokens >= mask.offset + last[:, None]
    if mask.window is not None:
        hidden |= (torch.arange(shape[1]) + 1) * column_tokens <= mask.offset + first[:, None] - mask.window + 1
    return image.masked_fill(hidden, torch.nan).numpy()


def _panels(pattern: SparsePattern, head: int, batch: int) -> list[go.Heatmap]:
    mask = pattern.mask
    mass = pattern.block_mass.reshape(mask.indices.shape)
    kept, row_tokens, column_tokens = mask_image(mask, None, head=head, batch=batch, largest=_SIDE)
    inside, _, _ = mask_image(mask, mass, head=head, batch=batch, largest=_SIDE)
    each = -(-mask.kv_len // _SIDE)
    dense = dense_image(pattern, head=head, batch=batch, row_tokens=each, column_tokens=each)
    means = dense_image(pattern, head=head, batch=batch, row_tokens=row_tokens, column_tokens=column_tokens)
    return [
        _shares(dense, mask.offset, each, each),
        _shares(means, mask.offset, row_tokens, column_tokens),
        image_trace(
            kept, kept, mask.offset, row_tokens, column_tokens, "share of blocks kept",
            hoverongaps=False, zmin=0, zmax=1, colorscale=[[0, pale("blue")], [1, COLOURS["blue"]]], showscale=False,
        ),
        _shares(inside, mask.offset, row_tokens, column_tokens),
    ]  # fmt: skip


def _shares(image: np.ndarray, offset: int, row_tokens: int, column_tokens: int) -> go.Heatmap:
    what = "share of a query"
    options = {"hoverongaps": False, "coloraxis": "coloraxis"}
    return image_trace(shown_share(image), image, offset, row_tokens, column_tokens, what, **options)


def _pattern(cache: SparseActivationCache, layer: int, head: int) -> SparsePattern:
    patterns = cache.patterns()
    if layer not in patterns or not 0 <= head < patterns[layer].mask.shape[1]:
        heads = max((pattern.mask.shape[1] for pattern in patterns.values()), default=0)
        raise ValueError(
            f"layer {layer}, head {head} has no sparse pattern: layers {list(patterns)} of {heads} heads are cached."
        )
    return patterns[layer]

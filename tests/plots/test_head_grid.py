"""The grid of all heads: every small picture is its head's mask, and the figure stays light."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stream_lens as sl
from stream_lens.backend import RunInfo
from stream_lens.backend.pattern_data import MassCell, PatternData
from stream_lens.blocks import BlockMask, StreamConfig
from stream_lens.plots import head_grid, mask_image
from stream_lens.plots.masks import shown_share
from tests.plots.runs import tiny_run


def many_heads(layers: int, heads: int, q_blocks: int) -> sl.SparseActivationCache:
    row = torch.arange(q_blocks)[:, None]
    indices = torch.cat([torch.zeros_like(row), row], -1).int()
    indices[0] = torch.tensor([0, -1])
    mask = BlockMask(indices.expand(1, heads, -1, -1).contiguous(), 32, 32, 32 * q_blocks, 32 * q_blocks)
    mass = torch.where(mask.kept, 16.0, 0.0)
    cached = {}
    for layer in range(layers):
        cell = MassCell(mask, mass)
        data = PatternData(mask, None, cell, ([0], list(range(heads)), 0), (None,), layer=layer)
        cached[f"blocks.{layer}.attn.hook_pattern"] = sl.SparsePattern(data)
    return sl.SparseActivationCache(cached, None, info=RunInfo("many", StreamConfig(k=2)))


def test_every_small_picture_is_its_heads_mask() -> None:
    cache = tiny_run(90)
    figure = head_grid(cache)
    drawn = {trace.name: trace for trace in figure.data if trace.type == "heatmap"}
    assert set(drawn) == {f"L{layer}H{head}" for layer in range(3) for head in range(4)}
    for layer, pattern in cache.patterns().items():
        for head in range(4):
            image, _, _ = mask_image(pattern.mask, pattern.block_mass, head=head)
            trace = drawn[f"L{layer}H{head}"]
            np.testing.assert_array_equal(trace.z, shown_share(image))
            assert trace.x0 + trace.dx * (image.shape[1] - 1) / 2 == pytest.approx(layer)
            assert trace.y0 + trace.dy * (image.shape[0] - 1) / 2 == pytest.approx(head)


def test_hover_and_title_say_what_is_pruned() -> None:
    cache = tiny_run(90)
    figure = head_grid(cache)
    for trace, (layer, head) in zip(figure.data, [(n, h) for n in range(3) for h in range(4)], strict=False):
        mask = cache.patterns()[layer].mask
        pruned = mask.select(heads=[head]).sparsity("causal")
        assert f"layer {layer}, head {head}" in trace.hovertemplate
        assert f"{pruned:.1%} of the causal half" in trace.hovertemplate
        assert (f"window {mask.window}" if mask.window else "global") in trace.hovertemplate
    mean = np.mean([mask.sparsity("causal") for mask in cache.masks().values()])
    title = figure.layout.title.text
    assert all(part in title for part in ("T = 90", "k = 4", f"{mean:.1%} of the causal half", cache.info.model_name))
    bold = [text for text in figure.layout.xaxis.ticktext if text.startswith("<b>")]
    assert bold == [f"<b>{layer}</b>" for layer, mask in cache.masks().items() if mask.window is None]


@pytest.mark.parametrize(("layers", "heads"), [(18, 4), (30, 9)])
def test_it_stays_light(layers: int, heads: int) -> None:
    figure = head_grid(many_heads(layers, heads, 1024))
    cells = sum(trace.z.size for trace in figure.data if trace.type == "heatmap")
    assert cells <= 300_000
    assert len(figure.to_json()) < 3_000_000


def test_no_batch_axis_is_no_hindrance() -> None:
    cache = tiny_run(60)
    before = head_grid(cache)
    after = head_grid(cache.remove_batch_dim())
    for one, other in zip(before.data, after.data, strict=True):
        np.testing.assert_array_equal(one.z if one.type == "heatmap" else 0, other.z if one.type == "heatmap" else 0)


def test_no_patterns_no_grid() -> None:
    with pytest.raises(ValueError, match="no sparse patterns"):
        head_grid(sl.SparseActivationCache({}, None))

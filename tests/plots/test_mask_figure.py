"""Figures of block masks: one panel a mask, spans marked where they lie, axes in tokens."""

from __future__ import annotations

import numpy as np
import pytest

from stream_lens.plots import mask_figure, mask_image
from stream_lens.plots.masks import LEAST_SHARE, shown_share
from tests.plots.runs import tiny_run


def test_panels_hold_the_images_and_say_shares_on_hover() -> None:
    cache = tiny_run(100)
    panels = [
        (f"layer {layer}", pattern.mask, mass, 1)
        for layer, pattern in cache.patterns().items()
        for mass in (pattern.block_mass, None)
    ]
    figure = mask_figure(panels, "tiny, T = 100")
    assert [note.text for note in figure.layout.annotations] == [name for name, *_ in panels]
    for trace, (_, mask, mass, head) in zip(figure.data, panels, strict=True):
        image, rows, columns = mask_image(mask, mass, head=head)
        np.testing.assert_array_equal(trace.customdata, image)
        np.testing.assert_array_equal(trace.z, np.log10(np.maximum(image, LEAST_SHARE)))
        np.testing.assert_array_equal(trace.x, (np.arange(image.shape[1]) + 0.5) * columns)
        np.testing.assert_array_equal(trace.y, (np.arange(image.shape[0]) + 0.5) * rows)
        assert ("share of a row" if mass is not None else "share of blocks kept") in trace.hovertemplate
    assert figure.layout.title.text == "tiny, T = 100"
    assert [trace.showscale for trace in figure.data] == [True] + [False] * 5


def test_spans_are_marked_on_both_axes() -> None:
    pattern = tiny_run(100).patterns()[1]
    figure = mask_figure([("head", pattern.mask, None, 0)], "marked", spans={"needle": (16, 24), "question": (90, 100)})
    bands = [(s.x0, s.x1) if s.yref.endswith("domain") else (s.y0, s.y1) for s in figure.layout.shapes]
    assert sorted(bands) == [(16, 24), (16, 24), (90, 100), (90, 100)]
    assert {"needle", "question"} <= {note.text for note in figure.layout.annotations}


def test_shares_below_the_least_look_alike_and_nothing_kept_stays_empty() -> None:
    shown = shown_share(np.array([np.nan, 0.0, 1e-9, 0.01, 1.0]))
    np.testing.assert_allclose(shown, [np.nan, -4, -4, -2, 0])


def test_no_panel_no_figure() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        mask_figure([], "nothing")

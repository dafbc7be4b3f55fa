"""Four panels: dense attention by aggregation equals the dense model's, and no T × T is made for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stream_lens.backend import RunInfo
from stream_lens.plots import four_panels, mask_image
from stream_lens.plots.masks import shown_share
from stream_lens.plots.panels import dense_image
from tests.plots.runs import tiny_run


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, list | tuple) else [out]:
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return out


def dense_of(pattern: Any, head: int) -> torch.Tensor:
    scores = pattern.data_.sources[0]
    q, k = scores.q[0, head], scores.k[0, head // (scores.q.shape[1] // scores.k.shape[1])]
    logits = q @ k.T * scores.rule.scale
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) | (distance >= (pattern.mask.window or len(k)))
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 8), (16, 24)])
def test_dense_image_is_dense_attention_added_up(layer: int, rows: int, columns: int) -> None:
    pattern = tiny_run(150).patterns()[layer]
    dense = dense_of(pattern, 3)
    image = dense_image(pattern, head=3, row_tokens=rows, column_tokens=columns)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            cell = dense[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            if np.isnan(image[i, j]):
                assert (cell == 0).all()
            else:
                assert image[i, j] == pytest.approx(float(cell.sum() / len(cell)), abs=1e-6)
    assert (~np.isnan(image)).sum() == sum(
        bool((dense[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] > 0).any())
        for i in range(image.shape[0])
        for j in range(image.shape[1])
    )


def test_panels_draw_what_is_computed() -> None:
    caches = [tiny_run(40), tiny_run(100)]
    layer = next(layer for layer, mask in caches[0].masks().items() if mask.window is None)
    figure = four_panels(caches, layer, 2)
    assert len(figure.data) == 8
    for row, cache in enumerate(caches):
        pattern = cache.patterns()[layer]
        dense, means, kept, mass = figure.data[4 * row : 4 * row + 4]
        np.testing.assert_array_equal(kept.z, mask_image(pattern.mask, None, head=2)[0])
        np.testing.assert_array_equal(mass.z, shown_share(mask_image(pattern.mask, pattern.block_mass, head=2)[0]))
        np.testing.assert_allclose(np.nansum(dense.customdata, 1), 1, atol=1e-5)
        np.testing.assert_allclose(np.nansum(means.customdata, 1), 1, atol=1e-5)
    titles = [note.text for note in figure.layout.annotations]
    assert titles[0] == "T = 40: dense"
    pruned = caches[1].masks()[layer].select(heads=[2]).sparsity("causal")
    assert titles[6] == f"T = 100: Stream mask, {pruned:.1%} pruned"
    assert f"layer {layer}, head 2" in figure.layout.title.text
    assert "k = 4" in figure.layout.title.text


def test_no_square_of_the_text_is_made() -> None:
    cache = tiny_run(512, k=4)
    with Largest() as seen:
        four_panels([cache], 1, 0)
    assert 0 < seen.elements <= 128 * 512


def test_long_texts_and_missing_heads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_run(40)
    with pytest.raises(ValueError, match=r"layer 7, head 0 has no sparse pattern: layers \[0, 1, 2\] of 4 heads"):
        four_panels([cache], 7, 0)
    with pytest.raises(ValueError, match="at least one cache"):
        four_panels([], 0, 0)
    monkeypatch.setattr("stream_lens.plots.panels.LONGEST_DENSE", 32)
    with pytest.raises(ValueError, match="dense attention of 40 tokens is not drawn: the most is 32"):
        four_panels([cache], 0, 0)


def test_caches_without_a_config_are_drawn() -> None:
    cache = tiny_run(40)
    cache.info = RunInfo("m", None)
    assert "k unknown" in four_panels([cache], 0, 0).layout.title.text

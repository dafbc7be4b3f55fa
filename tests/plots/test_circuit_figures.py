"""Figures of circuits' results show the numbers that the results hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from stream_lens import plots
from stream_lens.blocks import BlockMask, StreamConfig
from stream_lens.circuits.ablation import AblationEffects
from stream_lens.circuits.attribution import GateAttribution
from stream_lens.circuits.head_controls import HeadsAgainstRandom
from stream_lens.circuits.mask_diff import mask_diff
from stream_lens.circuits.minimal_k import MinimalK, Trial
from stream_lens.circuits.pruning import PrunedEdges
from stream_lens.circuits.receiver_heads import ReceiverHeads
from stream_lens.circuits.retrieval import RetrievalScores
from stream_lens.circuits.route_results import route_diff
from stream_lens.circuits.routes import routes
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.suppression import SegmentSuppression
from stream_lens.circuits.thought_anchors import ThoughtAnchors
from stream_lens.circuits.vertical_scores import VerticalScores

T = 64


def mask_of(seed: int, heads: int = 3) -> BlockMask:
    """A causal block mask with the diagonal, 8 blocks of 8 tokens."""
    chosen = torch.rand(1, heads, 8, 8, generator=torch.Generator().manual_seed(seed)) < 0.4
    blocks = torch.tril(chosen | torch.eye(8, dtype=torch.bool))
    dense = blocks.repeat_interleave(8, -1).repeat_interleave(8, -2)
    return BlockMask.from_dense(dense & torch.ones(T, T, dtype=torch.bool).tril(), 8, 8)


def masks_of(seed: int, layers: int = 4) -> dict[int, BlockMask]:
    return {layer: mask_of(10 * seed + layer) for layer in range(layers)}


def segments_of(count: int = 8) -> Segments:
    spans = tuple((j * 8, j * 8 + 8) for j in range(count))
    names = ("problem_setup", "self_checking", None)
    return Segments(
        text="<b> word" * count,
        labels=tuple(f"<s{j}>" for j in range(count)),
        categories=tuple(names[j % 3] for j in range(count)),
        char_spans=spans,
        token_spans=spans,
        n_tokens=8 * count,
        n_bos=0,
    )


def scores_of() -> VerticalScores:
    scores = np.random.default_rng(0).random((2, 3, 8)) ** 4
    scores[..., -4:] = np.nan
    return VerticalScores((scores,), (segments_of(),), (5, 11), 4, False, True)


def kurtosis_of() -> ReceiverHeads:
    values = np.arange(6.0).reshape(1, 2, 3)
    return ReceiverHeads(((11, 2), (11, 1)), values[0], values, (5, 11), None)


def minimal_of(budgets: bool = False) -> MinimalK:
    trials = (
        Trial(16, None, None, 2, True, 0.001, 4.0),
        Trial(8, None, None, 2, True, 0.05, 3.0),
        Trial(4, None, None, 0, False, 1.4, -1.0),
        Trial(6, None, None, 1, False, 0.6, 0.5),
        Trial(7, None, None, 2, True, 0.2, 1.0),
    )
    own = {(layer, head): layer + head + 1 for layer in range(3) for head in range(4)} if budgets else {}
    return MinimalK(7, True, True, own, StreamConfig(k=7), (1, 2), 5.0, trials, 7, 2000, "a model")


def attribution_of() -> GateAttribution:
    masks = masks_of(0)
    generator = torch.Generator().manual_seed(1)
    scores = {
        layer: torch.randn(mask.indices.shape, generator=generator).masked_fill(~mask.kept, 0.0)
        for layer, mask in masks.items()
    }
    return GateAttribution(scores, masks, 2.5, 1, None)  # type: ignore[arg-type]


def effects_of() -> AblationEffects:
    table = pd.DataFrame(
        {"name": ["needle <x>", "far"], "blocks": [12, 300], "value": [0.5, 2.5], "effect": [1.5, -0.5]}
    )
    return AblationEffects(2.0, table, "drop")


def controls_of() -> HeadsAgainstRandom:
    return HeadsAgainstRandom(((1, 0),), 2.0, 1.4, (0.1, 0.3, 0.2), 0.2, (0.0, 0.4), 0.95, 4, (((0, 0),),) * 3)


def pruned_of() -> PrunedEdges:
    curve = pd.DataFrame({"edges": [0, 4, 8, 90], "value": [0.0, 1.0, 1.9, 2.0], "faithfulness": [0, 0.5, 0.95, 1.0]})
    return PrunedEdges(masks_of(0), 8, 90, 0.95, 0.9, 2.0, 0.0, (0.1, 0.3), curve)


def retrieval_of() -> RetrievalScores:
    by_case = np.random.default_rng(0).random((3, 2, 4))
    return RetrievalScores(by_case.mean(0), (5, 11), by_case, 4, (True, True, False, True), "token")


def suppression_of() -> SegmentSuppression:
    log_kl = np.array([[-3.0, -1.0], [np.nan, -5.0]])
    return SegmentSuppression(log_kl, (0, 1), (1, 2), (10, 20), (8, 8), ("<a>", "<b>", "<c>"), 0.6, "drop")


def routes_of(seed: int = 0):
    scores = torch.randn(4, 1, 3, T, T, generator=torch.Generator().manual_seed(seed))
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    dense = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return routes(dict(enumerate(dense)), (0, 8), (56, 64), segments_of())


def figures() -> dict[str, go.Figure]:
    """All of them, by name; also for a look."""
    pairs = mask_diff([masks_of(s) for s in range(3)], [masks_of(s + 3) for s in range(3)])
    anchors = ThoughtAnchors((np.linspace(0, 1, 8),), (segments_of(),), ((5, 0),))
    return {
        "kurtosis": plots.kurtosis(kurtosis_of()),
        "vertical_scores": plots.vertical_scores(scores_of()),
        "thought_anchors": plots.thought_anchors(anchors),
        "mask_diff": plots.mask_diff(pairs),
        "mask_diff_head": plots.mask_diff(pairs, head=(1, 2)),
        "minimal_k": plots.minimal_k(minimal_of()),
        "minimal_k_heads": plots.minimal_k(minimal_of(budgets=True)),
        "attribution": plots.attribution(attribution_of()),
        "ablation": plots.ablation(effects_of()),
        "ablation_control": plots.ablation(controls_of()),
        "pruning": plots.pruning(pruned_of()),
        "retrieval": plots.retrieval(retrieval_of()),
        "suppression": plots.suppression(suppression_of()),
        "routes": plots.routes(routes_of()),
        "route_diff": plots.routes(route_diff(routes_of(0), routes_of(1))),
    }


def test_kurtosis_shows_every_head_and_circles_receivers() -> None:
    result = kurtosis_of()
    heat, circles = plots.kurtosis(result).data
    np.testing.assert_array_equal(heat.z, result.kurtosis)
    assert list(heat.y) == ["5", "11"]
    assert list(zip(circles.y, circles.x, strict=True)) == [("11", 2), ("11", 1)]


def test_vertical_scores_draw_each_segment_once_in_its_category() -> None:
    result = scores_of()
    figure = plots.vertical_scores(result, heads=[(11, 2)])
    drawn = {int(x): y for bars in figure.data for x, y in zip(bars.x, bars.y, strict=True)}
    np.testing.assert_array_equal([drawn[j] for j in range(8)], result.scores[0][1, 2])
    assert {bars.name for bars in figure.data} == {"problem setup", "self checking", "no category"}
    assert len({bars.marker.color for bars in figure.data}) == 3
    assert all("<s" not in text for bars in figure.data for text in bars.customdata)


def test_vertical_scores_of_a_head_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="layer 6, head 0 is not there"):
        plots.vertical_scores(scores_of(), heads=[(6, 0)])


def test_mask_diff_of_heads_and_of_one_head() -> None:
    one, other = masks_of(0), masks_of(1)
    result = mask_diff(one, other)
    figure = plots.mask_diff(result)
    assert f"T = {one[0].kv_len}, k = " in figure.layout.title.text
    for layer in one:
        added = (one[layer] - other[layer]).kept.sum((0, 2, 3))
        np.testing.assert_array_equal(figure.data[0].z[layer], added)
    (heat,) = plots.mask_diff(result, head=(2, 1)).data
    ours, theirs = (masks[2].select(heads=[1]) for masks in (one, other))
    assert int((heat.z == 1).sum()) == int((ours - theirs).kept.sum())
    assert int((heat.z == -1).sum()) == int((theirs - ours).kept.sum())
    assert int((heat.z == 0).sum()) == int((ours & theirs).kept.sum())
    with pytest.raises(ValueError, match="head 9"):
        plots.mask_diff(result, head=(2, 9))


def test_minimal_k_tells_kept_from_lost() -> None:
    figure = plots.minimal_k(minimal_of())
    points = {trace.name: dict(zip(trace.x, trace.y, strict=True)) for trace in figure.data if trace.name}
    assert set(points["answer kept"]) == {7, 8, 16}
    assert points["answer lost"] == {4: 1.4, 6: 0.6}
    assert "Minimal k = 7: a model" in figure.layout.title.text
    assert "T = 2,000" in figure.layout.title.text
    heat = plots.minimal_k(minimal_of(budgets=True)).data[-1]
    assert heat.z[2][3] == 6


def test_attribution_shows_heads_and_the_largest_blocks() -> None:
    result = attribution_of()
    heat, bars = plots.attribution(result, top=5).data
    np.testing.assert_allclose(heat.z[1], result.scores[1].sum((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(np.sort(np.abs(bars.x)), np.sort(result.top_edges(5)["score"].abs()))
    assert heat.zmin == -heat.zmax


def test_ablation_bars_and_controls() -> None:
    (bars,) = plots.ablation(effects_of()).data
    assert dict(zip(bars.y, bars.x, strict=True)) == {"needle &lt;x&gt;": 1.5, "far": -0.5}
    sets, mean, chosen = plots.ablation(controls_of()).data
    assert (list(sets.x), list(mean.x), list(chosen.x)) == ([0.1, 0.3, 0.2], [0.2], [1.4])


def test_routes_draw_every_edge_from_layer_to_layer() -> None:
    result = routes_of()
    figure = plots.routes(result)
    lines = [trace for trace in figure.data if trace.name in ("attention", "stays in place")]
    assert sum(x is None or x != x for trace in lines for x in trace.x) == len(result.edges)
    (hovers,) = [trace for trace in figure.data if trace.name == "edges"]
    assert len(hovers.x) == len(result.edges)
    assert len(figure.layout.yaxis.ticktext) == len(result.layers) + 1


def test_route_difference_is_signed() -> None:
    diff = route_diff(routes_of(0), routes_of(1))
    (bars,) = plots.routes(diff).data
    np.testing.assert_allclose(sorted(bars.x), sorted(diff.to_frame().head(30)["difference"]))


def test_pruning_draws_the_curve_and_the_random_control() -> None:
    result = pruned_of()
    curve, random = plots.pruning(result).data
    assert dict(zip(curve.x, curve.y, strict=True)) == {4: 0.5, 8: 0.95, 90: 1.0}  # no logarithm of none
    assert list(zip(random.x, random.y, strict=True)) == [(8, 0.1), (8, 0.3)]
    assert "8 blocks recover 95%" in plots.pruning(result).layout.title.text


def test_retrieval_shows_every_head_and_how_many_answers() -> None:
    result = retrieval_of()
    figure = plots.retrieval(result)
    np.testing.assert_array_equal(figure.data[0].z, result.scores)
    assert list(figure.data[0].y) == [5, 11]
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, result.scores.max())
    assert "3 of 4 cases answered" in figure.layout.title.text


def test_suppression_has_the_cut_segments_across_and_the_measured_down() -> None:
    result = suppression_of()
    (heat,) = plots.suppression(result).data
    np.testing.assert_array_equal(heat.z, result.log_kl.T)
    assert list(heat.x) == ["0 &lt;a&gt;", "1 &lt;b&gt;"]
    assert list(heat.y) == ["1 &lt;b&gt;", "2 &lt;c&gt;"]


def test_every_figure_has_a_title_and_named_axes() -> None:
    for name, figure in figures().items():
        assert figure.layout.title.text, name
        assert any(axis.title.text for axis in figure.select_xaxes()), name

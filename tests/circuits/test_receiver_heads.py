"""Receiver heads and thought anchors: a planted receiver comes first, averages are what they say, errors speak."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import torch

from stream_lens.circuits.receiver_heads import rank_correlation, receiver_heads
from stream_lens.circuits.thought_anchors import thought_anchors
from stream_lens.circuits.vertical_scores import vertical_scores
from tests.circuits.reference import cut_at, random_pattern, segments_at, streamed

SPANS = cut_at(*range(0, 97, 8))
SEGMENTS = segments_at(SPANS, 96)
CATEGORIES = ("problem_setup", "plan_generation") * 6


def planted_receiver(seed: int):
    """Head 1 of layer 3 keeps coming back to segment 2."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 3, 96, 8, generator=generator, dtype=torch.float64)
    q[0, 1, :, 0], k[0, 1, 16:24, 0] = 8.0, 8.0
    return {
        layer: streamed(
            q if layer == 3 else q * 0.3, k * (1 if layer == 3 else 0.3), layer=layer, q_block=8, k_block=8, k=6
        )
        for layer in (2, 3)
    }


def test_the_planted_receiver_comes_first_and_its_segment_is_the_anchor():
    runs = [planted_receiver(seed) for seed in range(4)]
    found = receiver_heads(runs, SEGMENTS, top_n=3)
    assert found.heads[0] == (3, 1)
    assert len(found.heads) == 3
    each = vertical_scores(runs, SEGMENTS).kurtosis()
    np.testing.assert_allclose(found.kurtosis, np.nanmean(each, 0))
    even, odd = each[0::2].mean(0).ravel(), each[1::2].mean(0).ravel()
    assert found.split_half == pytest.approx(scipy.stats.pearsonr(even, odd).statistic)
    frame = found.to_frame()
    assert tuple(frame.loc[0, ["layer", "head", "receiver"]]) == (3, 1, True)
    assert frame["receiver"].sum() == 3
    assert json.loads(found.to_json())["heads"][0] == [3, 1]
    anchors = thought_anchors(runs, SEGMENTS, found.heads[:1], CATEGORIES)
    assert all(int(np.nanargmax(scores)) == 2 for scores in anchors.scores)
    assert anchors.by_category().loc[0, "category"] == "problem_setup"
    assert anchors.by_category()["segments"].sum() == 4 * 8
    shares = anchors.to_frame().groupby("text")["share"].sum()
    np.testing.assert_allclose(shares, 1.0)


def test_one_text_has_no_split_half_and_skipped_layers_no_receivers():
    found = receiver_heads(planted_receiver(0), SEGMENTS, top_n=6, skip_layers=[3])
    assert found.split_half is None
    assert {layer for layer, _ in found.heads} == {2}


def test_scores_made_before_give_the_same():
    runs = [planted_receiver(seed) for seed in range(2)]
    scores = vertical_scores(runs, SEGMENTS, min_distance=2)
    one, other = receiver_heads(scores), receiver_heads(runs, SEGMENTS, min_distance=2)
    assert one.heads == other.heads
    np.testing.assert_array_equal(
        thought_anchors(scores).scores, thought_anchors(runs, SEGMENTS, min_distance=2).scores
    )
    same = rank_correlation(one, other)
    assert (same.spearman, same.heads, same.top_shared) == (pytest.approx(1.0), 6, 1.0)


def test_a_head_without_any_spread_has_no_kurtosis():
    pattern = random_pattern(96, q_block=8, k_block=8, k=4)
    dense = pattern.to_dense()
    dense[:, 0] = 0
    found = receiver_heads(dense, SEGMENTS)
    assert np.isnan(found.kurtosis[0, 0])
    assert found.heads == ((0, 1),)
    with pytest.raises(ValueError, match="only 1 heads"):
        rank_correlation(found, found)


def test_what_cannot_take_effect_says_so():
    scores = vertical_scores(planted_receiver(0), SEGMENTS)
    with pytest.raises(ValueError, match="top_n=0"):
        receiver_heads(scores, top_n=0)
    for tool in (receiver_heads, thought_anchors):
        with pytest.raises(ValueError, match="cannot take effect"):
            tool(scores, SEGMENTS)
        with pytest.raises(ValueError, match="cannot take effect"):
            tool(scores, min_distance=2)
        with pytest.raises(TypeError, match="needs the segments"):
            tool(planted_receiver(0))
    with pytest.raises(ValueError, match=r"heads \[\(9, 0\)\]"):
        thought_anchors(scores, heads=[(9, 0)])
    with pytest.raises(ValueError, match="no segment has a category"):
        thought_anchors(scores).by_category()
    with pytest.raises(ValueError, match="1 texts need as many lists of categories"):
        thought_anchors(scores, categories=[CATEGORIES, CATEGORIES])
    with pytest.raises(ValueError, match="layers"):
        rank_correlation(
            receiver_heads(scores), receiver_heads(random_pattern(96, q_block=8, k_block=8, k=4), SEGMENTS)
        )

"""Vertical scores against loops over the definition: dense, exact at any segments, by overlap where blocks align."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stream_lens as sl
from stream_lens.backend.pattern_data import NoScoresError
from stream_lens.circuits.vertical_scores import vertical_scores
from tests.backend.tiny_models import VOCAB, tiny_bridge
from tests.circuits.reference import cut_at, kurtosis_of, random_pattern, segments_at, streamed, vertical_scores_of


@st.composite
def segmentations(draw, tokens: int) -> list[tuple[int, int]]:
    """Ascending, disjoint spans, some of them empty or apart from their neighbours."""
    edges = sorted(draw(st.lists(st.integers(0, tokens), min_size=2, max_size=14)))
    spans = cut_at(*edges)
    return [span for span in spans if draw(st.integers(0, 5))] or spans


@given(st.data())
@settings(max_examples=30)
def test_sparse_sums_are_those_of_the_dense_pattern(data):
    tokens = data.draw(st.integers(2, 60))
    spans = data.draw(segmentations(tokens))
    q_block, k_block = data.draw(st.sampled_from([(4, 4), (8, 4), (4, 8), (5, 3)]))
    distance = data.draw(st.integers(1, 5))
    ranks = data.draw(st.booleans())
    pattern = random_pattern(tokens, q_block=q_block, k_block=k_block, k=data.draw(st.integers(4, 12)), seed=tokens)
    want = vertical_scores_of(pattern.to_dense()[0], spans, distance, ranks)
    options = {"min_distance": distance, "control_depth": ranks}
    segments = segments_at(spans, tokens)
    for source in (pattern, pattern.to_dense()):
        ours = vertical_scores(source, segments, **options)
        np.testing.assert_allclose(ours.scores[0][0], want, atol=1e-12)
        assert ours.exact


@given(st.integers(3, 70), st.sampled_from([4, 8]), st.integers(2, 20), st.integers(1, 4))
@settings(max_examples=25)
def test_block_masses_alone_give_the_same_where_segments_end_at_block_edges(tokens, block, k, distance):
    pattern = random_pattern(tokens, q_block=block, k_block=block, k=k, seed=k)
    spans = cut_at(*range(0, tokens, block), tokens)
    ours = vertical_scores(pattern, segments_at(spans, tokens), min_distance=distance, exact=False)
    np.testing.assert_allclose(
        ours.scores[0][0], vertical_scores_of(pattern.to_dense()[0], spans, distance), atol=1e-12
    )
    assert ours.exact


def test_masses_shared_by_overlap_add_up_and_stay_near():
    pattern = random_pattern(96, q_block=8, k_block=8, k=12)
    segments = segments_at(cut_at(0, 11, 30, 37, 60, 71, 90, 96), 96)
    near = vertical_scores(pattern, segments, min_distance=1, exact=False)
    assert not near.exact
    want = vertical_scores(pattern, segments, min_distance=1).scores[0][0, :, :-1]
    assert np.corrcoef(near.scores[0][0, :, :-1].ravel(), want.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM"])
def test_full_k_is_the_dense_computation(architecture):
    model = tiny_bridge(architecture)
    tokens = torch.randint(3, VOCAB, (2, 75), generator=torch.Generator().manual_seed(1))
    segments = segments_at(cut_at(1, 9, 13, 20, 33, 34, 41, 52, 60, 75), 75)
    _, dense = model.run_with_cache(tokens)
    with sl.stream(model, q_block=8, k_block=8, k=10):
        _, cache = model.run_with_cache(tokens)
    ours, reference = vertical_scores(cache, segments), vertical_scores(dense, segments)
    for text in range(2):
        for layer in ours.layers:
            want = vertical_scores_of(dense["pattern", layer][text], list(segments.token_spans), 4)
            np.testing.assert_allclose(ours.scores[text][layer], want, atol=1e-6)
            np.testing.assert_allclose(reference.scores[text][layer], want, atol=1e-12)
            np.testing.assert_allclose(ours.kurtosis()[text, layer], kurtosis_of(want), rtol=1e-4, atol=1e-4)


def test_kurtosis_at_full_k_is_the_dense_one_to_1e_6():
    pattern = random_pattern(90, heads=4, q_block=8, k_block=8, k=12)
    segments = segments_at(cut_at(0, 9, 13, 20, 33, 34, 41, 52, 60, 70, 77, 90), 90)
    want = kurtosis_of(vertical_scores_of(pattern.to_dense()[0], list(segments.token_spans), 4))
    np.testing.assert_allclose(vertical_scores(pattern, segments).kurtosis()[0, 0], want, atol=1e-6)


def test_an_observed_run_gives_shares_of_the_dense_pattern():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 70, 8, dtype=torch.float64) * 2
    pattern = streamed(q, k, q_block=8, k_block=8, k=3, observe=True)
    whole = streamed(q, k, q_block=8, k_block=8, k=9)
    shares = whole.to_dense()[0] * pattern.mask.to_dense()[0]
    segments = segments_at(cut_at(0, 5, 13, 20, 33, 41, 52, 60, 70), 70)
    info = sl.SparseActivationCache({}, None).info
    cache = sl.SparseActivationCache(
        {"blocks.0.attn.hook_pattern": pattern}, None, True, type(info)("toy", None, observe=True)
    )
    ours = vertical_scores(cache, segments, min_distance=2)
    np.testing.assert_allclose(ours.scores[0][0], vertical_scores_of(shares, list(segments.token_spans), 2), atol=1e-12)
    aligned = segments_at(cut_at(*range(0, 70, 8), 70), 70)
    by_mass, exact = (vertical_scores(cache, aligned, min_distance=2, exact=choice) for choice in (False, True))
    np.testing.assert_allclose(by_mass.scores[0], exact.scores[0], atol=1e-12)


def test_a_gate_counts():
    pattern = random_pattern(64, q_block=8, k_block=8, k=4)
    gated = pattern.scale(0.5, heads=[1])
    segments = segments_at(cut_at(0, 7, 20, 31, 45, 64), 64)
    for exact in (True, False):
        before, after = (vertical_scores(p, segments, min_distance=1, exact=exact) for p in (pattern, gated))
        np.testing.assert_allclose(after.scores[0][0, 0], before.scores[0][0, 0])
        np.testing.assert_allclose(after.scores[0][0, 1], before.scores[0][0, 1] / 2)


def test_a_patched_pattern_counts_as_patched():
    clean, corrupted = (random_pattern(64, q_block=8, k_block=8, k=3, seed=seed) for seed in (0, 1))
    corrupted[:, 1] = clean[:, 1]
    segments = segments_at(cut_at(0, 7, 20, 31, 45, 64), 64)
    ours = vertical_scores(corrupted, segments, min_distance=1)
    want = vertical_scores_of(corrupted.to_dense()[0], list(segments.token_spans), 1)
    np.testing.assert_allclose(ours.scores[0][0], want, atol=1e-12)
    np.testing.assert_allclose(ours.scores[0][0, 1], vertical_scores(clean, segments, min_distance=1).scores[0][0, 1])


def test_a_cache_from_a_file_needs_no_model(tmp_path):
    model = tiny_bridge("LlamaForCausalLM")
    segments = segments_at(cut_at(1, 8, 15, 24, 30, 40, 48, 57, 66), 66)
    with sl.stream(model, q_block=8, k_block=8, k=3):
        _, cache = model.run_with_cache(torch.randint(3, VOCAB, (1, 66)))
    for scores in (False, True):
        cache.save(tmp_path / "cache.safetensors", scores=scores)
        loaded = sl.SparseActivationCache.load(tmp_path / "cache.safetensors")
        ours = vertical_scores(loaded, segments)
        assert ours.exact == scores
        np.testing.assert_allclose(ours.scores[0], vertical_scores(cache, segments, exact=scores).scores[0], atol=1e-7)
    with pytest.raises(NoScoresError, match="keep_scores=True"):
        vertical_scores(cache.without_scores(), segments, exact=True)


def test_a_batch_padded_on_the_right_is_its_texts():
    model = tiny_bridge("Qwen3ForCausalLM")
    tokens = torch.randint(3, VOCAB, (2, 60))
    mask = torch.ones_like(tokens)
    mask[1, 44:] = 0
    edges = [(1, 6, 12, 19, 25, 33, 41, 44), (1, 8, 16, 24, 33, 40, 44)]
    segments = [segments_at(cut_at(*edges[0], 60), 60), segments_at(cut_at(*edges[1]), 44)]
    with sl.stream(model, q_block=8, k_block=8, k=8):
        _, batch = model.run_with_cache(tokens, attention_mask=mask)
        _, alone = model.run_with_cache(tokens[1:, :44])
    ours = vertical_scores(batch, segments, min_distance=2)
    want = vertical_scores(alone, segments[1], min_distance=2)
    np.testing.assert_allclose(ours.scores[1], want.scores[0], atol=1e-5)
    mask = mask.flip(-1)
    with sl.stream(model, q_block=8, k_block=8, k=8):
        _, batch = model.run_with_cache(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="padded on the left"):
        vertical_scores(batch, segments)


def test_several_caches_and_one_at_a_time_are_the_same():
    patterns = [random_pattern(64, q_block=8, k_block=8, k=4, seed=seed) for seed in range(3)]
    segments = segments_at(cut_at(*range(0, 65, 8)), 64)
    together = vertical_scores((pattern for pattern in patterns), segments)
    assert together.kurtosis().shape == (3, 1, 2)
    for pattern, scores in zip(patterns, together.scores, strict=True):
        np.testing.assert_array_equal(scores, vertical_scores(pattern, segments).scores[0])


def test_frame_and_json():
    scores = vertical_scores(random_pattern(64, q_block=8, k_block=8, k=4), segments_at(cut_at(*range(0, 65, 8)), 64))
    frame = scores.to_frame()
    assert list(frame.columns) == ["text", "layer", "head", "segment", "label", "category", "vertical_score"]
    assert len(frame) == 2 * 8
    assert frame["vertical_score"].isna().sum() == 2 * 4
    assert (
        frame.loc[(frame["head"] == 1) & (frame["segment"] == 2), "vertical_score"].item() == scores.scores[0][0, 1, 2]
    )
    document = json.loads(scores.to_json())
    assert document["scores"][0][0][1][-1] is None
    assert document["scores"][0][0][1][0] == scores.scores[0][0, 1, 0]


def test_what_cannot_be_scored_says_so():
    pattern = random_pattern(64, q_block=8, k_block=8, k=4)
    segments = segments_at(cut_at(*range(0, 65, 8)), 64)
    with pytest.raises(ValueError, match="min_distance=0"):
        vertical_scores(pattern, segments, min_distance=0)
    with pytest.raises(ValueError, match="exact='maybe'"):
        vertical_scores(pattern, segments, exact="maybe")
    with pytest.raises(ValueError, match="64 queries by 64 keys and the segments' text 60 tokens"):
        vertical_scores(pattern, segments_at(cut_at(0, 30, 60), 60))
    with pytest.raises(ValueError, match="32 queries by 64 keys"):
        vertical_scores(pattern[:, :, 32:], segments)
    with pytest.raises(ValueError, match="more texts than the 1 segments"):
        vertical_scores([pattern, pattern], [segments])
    with pytest.raises(ValueError, match="more segments than the 1 texts"):
        vertical_scores(pattern, [segments, segments])
    with pytest.raises(ValueError, match="no caches"):
        vertical_scores([], segments)
    with pytest.raises(TypeError, match="a int was given"):
        vertical_scores(3, segments)
    with pytest.raises(ValueError, match="layers"):
        vertical_scores([pattern, {3: pattern}], segments)
    with pytest.raises(ValueError, match="no patterns"):
        vertical_scores(sl.SparseActivationCache({}, None), segments)

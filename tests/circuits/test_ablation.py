"""Ablations against dense edits at full k, head controls, and segment suppression against a direct computation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import stream_lens as sl
from stream_lens.circuits.ablation import (
    Ablation,
    ablate,
    drop_beyond,
    drop_heads,
    drop_spans,
)
from stream_lens.circuits.head_controls import heads_against_random, random_heads
from stream_lens.circuits.metrics import logit_difference
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.suppression import segment_suppression
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.tiny_models import tiny_bridge

T = 64
FULL = sl.StreamConfig(q_block=8, k_block=8, k=8)
SPARSE = FULL.with_k(4)
METRIC = logit_difference(11, 12)
MODELS = {
    "bridge": lambda: tiny_bridge("LlamaForCausalLM"),
    "gemma2": lambda: tiny_bridge("Gemma2ForCausalLM", final_logit_softcapping=3.0),
    "delegated": lambda: tiny_bridge("OPTForCausalLM"),
    "hooked": lambda: hooked_model("llama"),
}
KINDS = ["bridge", "gemma2", "delegated", pytest.param("hooked", marks=pytest.mark.hooked)]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return MODELS[request.param]()


def dense_edits(model, tokens, edit):
    """Metric of a run where every layer's probabilities, made dense at full k, go through `edit(dense, layer)`."""

    def through(pattern, hook):
        return edit(pattern.to_dense(), int(hook.name.split(".")[1]))

    with sl.stream(model, FULL), torch.no_grad():
        return float(METRIC(model.run_with_hooks(tokens, fwd_hooks=[(lambda n: n.endswith("hook_pattern"), through)])))


def renormalised(pattern):
    return pattern / pattern.sum(-1, keepdim=True).clamp(min=1e-30)


CASES = {
    "span": (drop_spans("span", (19, 27)), lambda p: (slice(None), slice(32, 64), slice(16, 32))),
    "span_rows": (drop_spans("span", (16, 24), rows=[(40, 47)]), lambda p: (slice(None), slice(40, 48), slice(16, 24))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["drop", "zero"])
def test_a_span_is_cut_as_in_the_dense_pattern(model, case, how):
    tokens = tokens_of(1, T)
    ablation, where = CASES[case]
    result = ablate(model, tokens, ablation, METRIC, FULL, how=how)

    def edit(pattern, layer):
        heads, rows, keys = where(pattern)
        pattern = pattern.clone()
        pattern[:, heads, rows, keys] = 0.0
        return renormalised(pattern) if how == "drop" else pattern

    row = result.table.iloc[0]
    assert row["value"] == pytest.approx(dense_edits(model, tokens, edit), abs=2e-4)
    assert row["effect"] == pytest.approx(result.base - row["value"])
    assert result.base == pytest.approx(dense_edits(model, tokens, lambda pattern, layer: pattern), abs=2e-4)
    assert row["blocks"] > 0


@pytest.mark.parametrize("how", ["drop", "zero"])
def test_heads_are_taken_out_wholly(model, how):
    tokens = tokens_of(1, T)
    result = ablate(model, tokens, drop_heads("two", [(0, 1), (2, 3)]), METRIC, FULL, how=how)

    def edit(pattern, layer):
        pattern = pattern.clone()
        for number, head in ((0, 1), (2, 3)):
            if number == layer:
                pattern[:, head] = 0.0
        return pattern

    assert result.table["value"].iloc[0] == pytest.approx(dense_edits(model, tokens, edit), abs=2e-4)


def test_what_lies_beyond_a_window_is_cut(model):
    tokens = tokens_of(1, T)
    result = ablate(model, tokens, drop_beyond("far", 16), METRIC, FULL)

    def edit(pattern, layer):
        pattern = pattern.clone()
        for i in range(8):
            pattern[:, :, 8 * i : 8 * i + 8, 8 : max(8, 8 * (i - 2))] = 0.0
        return renormalised(pattern)

    assert result.table["value"].iloc[0] == pytest.approx(dense_edits(model, tokens, edit), abs=2e-4)


def test_given_blocks_are_those_taken_out():
    model, tokens = tiny_bridge("LlamaForCausalLM"), tokens_of(1, T)
    with sl.stream(model, SPARSE):
        _, cache = model.run_with_cache(tokens)
        mask = cache.masks()[1]
        result = ablate(model, tokens, [Ablation("layer 1", blocks={1: mask}), Ablation("all")], METRIC)
    assert list(result.table["blocks"]) == [int(mask.kept.sum()), 3 * int(mask.kept.sum())]
    with sl.stream(model, SPARSE), torch.no_grad():
        hook = ("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern.drop(mask))
        logits = model.run_with_hooks(tokens, fwd_hooks=[hook])
        # Only layer 1 is edited, and layer 2 may choose other blocks than without the edit: hold_masks=False.
        free = ablate(model, tokens, Ablation("layer 1", blocks={1: mask}), METRIC, hold_masks=False)
    assert free.table["value"].iloc[0] == pytest.approx(float(METRIC(logits)), abs=1e-5)
    assert json.loads(result.to_json())["how"] == "drop"


def test_random_heads_are_others_and_as_many():
    every = [(layer, head) for layer in range(3) for head in range(4)]
    heads = [(0, 0), (0, 1), (2, 3)]
    for seed in range(10):
        for same_layers in (False, True):
            drawn = random_heads(heads, every, seed, same_layers)
            assert len(set(drawn)) == 3
            assert not set(drawn) & set(heads)
            if same_layers:
                assert sorted(layer for layer, _ in drawn) == [0, 0, 2]
    with pytest.raises(ValueError, match="cannot be drawn"):
        random_heads([(0, 0), (0, 1), (0, 2)], every, 0, True)


def test_heads_stand_beside_random_ones(model):
    inputs = [(tokens_of(1, T, seed), METRIC) for seed in range(2)]
    heads = [(0, 1), (1, 2)]
    result = heads_against_random(model, inputs, heads, SPARSE, seeds=4)
    each = [ablate(model, tokens, drop_heads("x", heads), metric, SPARSE) for tokens, metric in inputs]
    assert result.effect == pytest.approx(np.mean([one.table["effect"].iloc[0] for one in each]), abs=1e-5)
    again = [
        ablate(model, tokens, drop_heads("x", result.random_heads[2]), metric, SPARSE) for tokens, metric in inputs
    ]
    assert result.random_effects[2] == pytest.approx(np.mean([one.table["effect"].iloc[0] for one in again]), abs=1e-5)
    low, high = result.interval
    assert low < result.random_mean < high
    assert len(result.to_frame()) == 5
    assert json.loads(result.to_json())["inputs"] == 2


def segments_of(spans, n_tokens):
    text = "x" * n_tokens
    return Segments(
        text, tuple(f"s{j}" for j in range(len(spans))), (None,) * len(spans), tuple(spans), tuple(spans), n_tokens, 0
    )


def test_suppression_is_the_kl_of_whole_runs(model):
    tokens = tokens_of(1, T)
    spans = [(0, 10), (10, 24), (24, 40), (40, 45), (45, 64)]
    result = segment_suppression(model, tokens, segments_of(spans, T), SPARSE, temperature=0.6)
    with sl.stream(model, SPARSE), torch.no_grad():
        base, cache = model.run_with_cache(tokens)
        masks = cache.masks()
        for j, (start, stop) in enumerate(spans):
            end = -(-stop // 8) * 8

            def cut(pattern, hook, start=start, end=end):
                pattern = pattern.with_mask(masks[int(hook.name.split(".")[1])])
                first = start // 8 * 8
                return pattern.drop(keys=slice(first, end), rows=slice(end, T)) if end < T else pattern

            after = model.run_with_hooks(tokens, fwd_hooks=[(lambda n: n.endswith("hook_pattern"), cut)])
            p, q = ((x[0] / 0.6).log_softmax(-1) for x in (base, after))
            kl = (p.exp() * (p - q)).sum(-1)
            for i, (begin, last) in enumerate(spans):
                positions = range(max(begin - 1, end), last - 1) if begin >= end else range(0)
                if not len(positions):
                    assert np.isnan(result.log_kl[j, i])
                    continue
                expected = float(kl[list(positions)].clamp(min=1e-12).log().mean())
                assert result.log_kl[j, i] == pytest.approx(expected, abs=0.02)
    assert result.covered == (16, 16, 16, 8, 24)
    assert np.isfinite(result.mean_effect()[:3]).all()
    frame = result.to_frame()
    assert len(frame) == np.isfinite(result.log_kl).sum()
    assert json.loads(result.to_json())["log_kl"][0][0] is None
    assert len(result.plot().data[0].x) == len(spans)


def test_suppression_counts_only_positions_that_were_cut():
    model, tokens = tiny_bridge("LlamaForCausalLM"), tokens_of(1, 128)
    segments = segments_of([(start, start + 8) for start in range(0, 128, 8)], 128)
    coarse = segment_suppression(model, tokens, segments, sl.StreamConfig(q_block=32, k_block=8, k=16))
    fine = segment_suppression(model, tokens, segments, sl.StreamConfig(q_block=8, k_block=8, k=16))
    cut = np.isfinite(coarse.log_kl)
    assert cut.any()
    assert not cut[:, :4].any()  # of the first query block, which keeps all its attention
    assert (coarse.log_kl[cut] > -20).all()
    assert np.isfinite(fine.log_kl).sum() > cut.sum()


def test_what_cannot_take_effect_is_refused():
    model, tokens = tiny_bridge("LlamaForCausalLM"), tokens_of(1, T)
    for ablation, message in (
        (drop_heads("x", [(0, 4)]), "no streamed head"),
        (drop_heads("x", [(3, 0)]), "no streamed head"),
        (drop_spans("x", (60, 65)), "not in the input"),
        (drop_spans("x", (6, 6)), "not in the input"),
        (drop_beyond("x", -1), "beyond=-1"),
        ([], "nothing to ablate"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(model, tokens, ablation, METRIC, SPARSE)
    with pytest.raises(ValueError, match="how="):
        ablate(model, tokens, Ablation("all"), METRIC, SPARSE, how="delete")
    with sl.stream(model, SPARSE, observe=True), pytest.raises(RuntimeError, match="observe"):
        ablate(model, tokens, Ablation("all"), METRIC)
    segments = segments_of([(0, 30), (30, 64)], T)
    with pytest.raises(ValueError, match="the same text"):
        segment_suppression(model, tokens[:, 1:], segments, SPARSE)
    with pytest.raises(ValueError, match="segments \\[2\\]"):
        segment_suppression(model, tokens, segments, SPARSE, suppressed=[2])
    with pytest.raises(ValueError, match="temperature"):
        segment_suppression(model, tokens, segments, SPARSE, temperature=0)

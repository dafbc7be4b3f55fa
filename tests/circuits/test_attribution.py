"""Gate attribution against finite differences in float64, ablation checks, and pruning."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import stream_lens as sl
from stream_lens.circuits.attribution import gate_attribution
from stream_lens.circuits.metrics import answer_log_probability, kl_to, logit_difference, with_answer
from stream_lens.circuits.pruning import check_by_ablation, prune
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.tiny_models import tiny_bridge

CONFIG = sl.StreamConfig(q_block=8, k_block=8, k=4)
METRIC = logit_difference(11, 12)
MODELS = {
    "bridge": lambda: tiny_bridge("LlamaForCausalLM"),
    "gemma3": lambda: tiny_bridge("Gemma3ForCausalLM"),
    "delegated": lambda: tiny_bridge("OPTForCausalLM"),
    "hooked": lambda: hooked_model("llama"),
}


@pytest.fixture(
    scope="module", params=["bridge", "gemma3", "delegated", pytest.param("hooked", marks=pytest.mark.hooked)]
)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(
    scope="module", params=["bridge", "gemma3", "delegated", pytest.param("hooked", marks=pytest.mark.hooked)]
)
def model64(request):
    made = MODELS[request.param]()
    if request.param == "hooked":
        return hooked_model("float64")
    made.original_model.double()
    made.cfg.dtype = torch.float64
    return made


def places_of(attribution, count, seed=0):
    places, scores = attribution.edges()
    chosen = np.random.default_rng(seed).permutation(len(places))[:count]
    return [
        (list(attribution.masks)[n], tuple(rest), s)
        for (n, *rest), s in zip(places[chosen], scores[chosen], strict=True)
    ]


def test_scores_are_finite_differences(model64):
    tokens = tokens_of(1, 90)
    attribution = gate_attribution(model64, tokens, METRIC, CONFIG)
    # transformers' RMS norms compute in float32 whatever the model's dtype: a wider step keeps their rounding out.
    single = any("RMSNorm" in type(module).__name__ for module in model64.modules()) and hasattr(
        model64, "original_model"
    )
    step, allowed = (2e-2, {"abs": 2e-4, "rel": 1e-2}) if single else (1e-3, {"abs": 1e-6, "rel": 1e-4})
    run = attribution.run
    for layer, place, score in places_of(attribution, 25):
        moved = []
        for gate in (1 + step, 1 - step):
            gates = run.ones()
            gates[layer][place] = gate
            moved.append(run.values([gates])[0])
        assert score == pytest.approx((moved[0] - moved[1]) / (2 * step), **allowed)


def test_value_and_masks_are_those_of_the_sparse_run(model):
    tokens = tokens_of(2, 90)
    attribution = gate_attribution(model, tokens, METRIC, CONFIG)
    with sl.stream(model, CONFIG), torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    assert attribution.value == pytest.approx(float((logits[:, -1, 11] - logits[:, -1, 12]).sum()), abs=1e-4)
    for layer, mask in cache.masks().items():
        assert torch.equal(mask.indices, attribution.masks[layer].indices)
        assert attribution.scores[layer].shape == mask.indices.shape
        assert not attribution.scores[layer][~mask.kept].any()


def test_a_text_scores_the_same_alone_and_in_a_batch(model):
    tokens = tokens_of(2, 90)
    both = gate_attribution(model, tokens, METRIC, CONFIG)
    alone = gate_attribution(model, tokens[1:], METRIC, CONFIG)
    for layer, scores in alone.scores.items():
        torch.testing.assert_close(both.scores[layer][1:], scores, atol=1e-5, rtol=1e-3)


def test_recomputing_blocks_changes_nothing(model):
    tokens = tokens_of(1, 90)
    one = gate_attribution(model, tokens, METRIC, CONFIG, recompute=True)
    other = gate_attribution(model, tokens, METRIC, CONFIG, recompute=False)
    for layer, scores in one.scores.items():
        torch.testing.assert_close(scores, other.scores[layer], atol=1e-6, rtol=1e-4)
    assert all("forward" not in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize("kind", ["bridge", pytest.param("hooked", marks=pytest.mark.hooked)])
def test_integrated_gradients_sum_up_to_what_all_blocks_do(kind):
    model = MODELS[kind]()
    attribution = gate_attribution(model, tokens_of(1, 90), METRIC, CONFIG, steps=20)
    run = attribution.run
    (none,) = run.values([{layer: torch.zeros_like(gate) for layer, gate in run.ones().items()}])
    total = sum(float(scores.sum()) for scores in attribution.scores.values())
    assert total == pytest.approx(attribution.value - none, rel=0.02)


def test_weights_ask_for_gradients_as_before_after_errors_too(model):
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():  # as in many notebooks
        gate_attribution(model, tokens_of(1, 50), METRIC, CONFIG)

    def broken(logits):
        raise RuntimeError("no metric")

    def detached(logits):
        return logits.detach().sum()

    with pytest.raises(RuntimeError, match="no metric"):
        gate_attribution(model, tokens_of(1, 50), broken, CONFIG)
    with pytest.raises(ValueError, match="do not detach"):
        gate_attribution(model, tokens_of(1, 50), detached, CONFIG)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not sl.is_streamed(model)
    first.requires_grad_(True)


def test_gates_at_full_k_are_edits_of_the_dense_pattern(model):
    """Zeroing a block's gate at full k is zeroing that part of the dense pattern."""
    tokens, layer, head = tokens_of(1, 64), 1, 2
    attribution = gate_attribution(model, tokens, METRIC, CONFIG.with_k(8))
    run = attribution.run
    gates = run.ones()
    gates[layer][0, head, 7, 3] = 0.0
    (ours,) = run.values([gates])
    dense = {}

    def keep_dense(pattern, hook):
        dense[hook.name] = pattern.to_dense()
        return pattern

    name = f"blocks.{layer}.attn.hook_pattern"
    with sl.stream(model, CONFIG.with_k(8)), torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keep_dense)])
        edited = dense[name].clone()
        edited[0, head, 56:64, 24:32] = 0.0
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda pattern, hook: edited)])
    assert ours == pytest.approx(float(METRIC(logits)), abs=1e-4)


def test_ablations_batched_are_ablations_alone(model):
    attribution = gate_attribution(model, tokens_of(1, 90), METRIC, CONFIG)
    alone = attribution.check_by_ablation(12, seed=3)
    batched = check_by_ablation(attribution, 12, seed=3, batch=5)
    np.testing.assert_allclose(alone.table["effect"], batched.table["effect"], atol=1e-5)
    assert alone.n == 12
    assert alone.pearson == pytest.approx(np.corrcoef(alone.table["score"], alone.table["effect"])[0, 1])


def test_a_sample_by_rank_takes_the_best_blocks_and_no_block_twice():
    attribution = gate_attribution(tiny_bridge("LlamaForCausalLM"), tokens_of(1, 90), METRIC, CONFIG)
    check = attribution.check_by_ablation(30, sample="by_rank")
    columns = ["layer", "head", "q_block", "k_block"]
    assert not check.table.duplicated(columns).any()
    assert check.n == len(check.table) == 30
    best = attribution.top_edges(1).iloc[0]
    assert (check.table[columns] == best[columns]).all(axis=1).any()
    assert json.loads(check.to_json())["n"] == 30


@pytest.mark.parametrize("renormalise", [False, True])
def test_pruned_masks_keep_the_metric(model, renormalise):
    attribution = gate_attribution(model, tokens_of(1, 90), METRIC, CONFIG)
    pruned = prune(attribution, 0.9, renormalise=renormalise, tolerance=0.0)
    assert pruned.faithfulness >= 0.9
    assert sum(int(mask.kept.sum()) for mask in pruned.masks.values()) == pruned.edges < pruned.all_edges
    assert all((mask - attribution.masks[layer]).kept.sum() == 0 for layer, mask in pruned.masks.items())
    below = pruned.curve[pruned.curve["edges"] == pruned.edges - 1]
    assert float(below["faithfulness"].iloc[0]) < 0.9
    assert len(pruned.random) == 3
    run = attribution.run
    if renormalise:
        # The pruned masks, handed to another run, are the pruned run.
        hooks = [
            (f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook, mask=mask: pattern.with_mask(mask))
            for layer, mask in pruned.masks.items()
        ]
        with sl.stream(model, CONFIG), torch.no_grad():
            again = float(METRIC(model.run_with_hooks(run.tokens, fwd_hooks=hooks)))
        value = float(pruned.curve.loc[pruned.curve["edges"] == pruned.edges, "value"].iloc[0])
        assert again == pytest.approx(value, abs=1e-4)
    assert json.loads(pruned.to_json())["edges"] == pruned.edges
    assert pruned.plot().data[0].x[-1] == pruned.all_edges


def test_tables_agree_with_scores():
    attribution = gate_attribution(tiny_bridge("LlamaForCausalLM"), tokens_of(2, 90), METRIC, CONFIG)
    frame = attribution.to_frame()
    assert len(frame) == sum(int(mask.kept.sum()) for mask in attribution.masks.values())
    row = frame.sample(1, random_state=0).iloc[0]
    layer, batch, head, q_block = (int(row[name]) for name in ("layer", "batch", "head", "q_block"))
    slot = attribution.masks[layer].indices[batch, head, q_block].tolist().index(int(row["k_block"]))
    assert row["score"] == pytest.approx(float(attribution.scores[layer][batch, head, q_block, slot]))
    top = attribution.top_edges(7)["score"].abs()
    assert list(top) == sorted(frame["score"].abs(), reverse=True)[:7]
    assert attribution.per_head()["score"].sum() == pytest.approx(frame["score"].sum(), abs=1e-5)
    assert len(attribution.per_layer()) == 3
    assert len(json.loads(attribution.to_json())["edges"]["score"]) == len(frame)


def test_metrics_say_what_they_need():
    model = tiny_bridge("LlamaForCausalLM")
    tokens = tokens_of(1, 60)
    answer = [9, 10, 11]
    metric = answer_log_probability(answer)
    with pytest.raises(ValueError, match="with_answer"):
        gate_attribution(model, tokens, metric, CONFIG)
    grown = with_answer(tokens, answer)
    attribution = gate_attribution(model, grown, metric, CONFIG)
    with sl.stream(model, CONFIG), torch.no_grad():
        logits = model(grown)
    expected = sum(float(logits[0, -3 + i].log_softmax(-1)[token]) for i, token in enumerate(answer))
    assert attribution.value == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="last_logits=2"):
        gate_attribution(model, grown, metric, CONFIG, last_logits=2)
    with pytest.raises(ValueError, match="one number"):
        gate_attribution(model, tokens, lambda logits: logits[0, -1], CONFIG)
    with pytest.raises(ValueError, match="steps=0"):
        gate_attribution(model, tokens, METRIC, CONFIG, steps=0)
    assert float(kl_to(logits)(logits)) == pytest.approx(0.0, abs=1e-6)


def test_what_cannot_take_effect_is_refused():
    model = tiny_bridge("LlamaForCausalLM")
    tokens = tokens_of(1, 60)
    with sl.stream(model, CONFIG, observe=True), pytest.raises(RuntimeError, match="observe"):
        gate_attribution(model, tokens, METRIC)
    with sl.stream(model, CONFIG):
        with pytest.raises(ValueError, match="streamed already"):
            gate_attribution(model, tokens, METRIC, CONFIG)
        attribution = gate_attribution(model, tokens, METRIC)
        assert attribution.check_by_ablation(2).n == 2
    with pytest.raises(ValueError, match="masks must name"):
        gate_attribution(model, tokens, METRIC, CONFIG, masks={0: attribution.masks[0]})
    with pytest.raises(ValueError, match="faithfulness"):
        prune(attribution, 0.0)
    with pytest.raises(ValueError, match="sample"):
        check_by_ablation(gate_attribution(model, tokens, METRIC, CONFIG), 2, sample="best")

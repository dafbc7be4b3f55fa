"""Minimal k against toys whose answer is known, and against brute force over every k."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import stream_lens as sl
from stream_lens.circuits.minimal_k import MinimalK, minimal_k
from tests.backend.hooked_models import VOCAB, hooked_model, tokens_of
from tests.backend.tiny_models import tiny_bridge

CONFIG = sl.StreamConfig(q_block=8, k_block=8)
MODELS = {
    "bridge": lambda: tiny_bridge("LlamaForCausalLM"),
    "delegated": lambda: tiny_bridge("OPTForCausalLM"),
    "hooked": lambda: hooked_model("llama"),
}


@pytest.fixture(scope="module", params=["bridge", "delegated", pytest.param("hooked", marks=pytest.mark.hooked)])
def model(request):
    return MODELS[request.param]()


def counting_model():
    """Every row attends evenly to what it keeps and says the token that it sees most often there."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1,
            d_model=VOCAB,
            n_ctx=256,
            d_head=VOCAB,
            n_heads=1,
            d_vocab=VOCAB,
            attn_only=True,
            normalization_type=None,
            positional_embedding_type="rotary",
            rotary_dim=VOCAB,
        )
    )
    for parameter in model.parameters():
        parameter.data.zero_()
    unit = torch.eye(VOCAB)
    model.embed.W_E.data, model.unembed.W_U.data = unit.clone(), unit.clone()
    model.blocks[0].attn.W_V.data[0], model.blocks[0].attn.W_O.data[0] = unit.clone(), 1000 * unit
    return model.eval()


def brute_force(model, tokens, config, n_match):
    """Every k's verdict, by full logits; and the dense answer."""
    with torch.no_grad():
        grown = tokens
        for _ in range(n_match):
            grown = torch.cat([grown, model(grown)[:, -1:].argmax(-1)], 1)
        verdicts = {}
        for k in range(config.forced_blocks, -(-grown.shape[1] // config.k_block) + 1):
            with sl.stream(model, config.with_k(k)):
                best = model(grown[:, :-1])[:, -n_match:].argmax(-1)
            verdicts[k] = bool((best == grown[:, -n_match:]).all())
    return verdicts, tuple(grown[0, -n_match:].tolist())


@pytest.mark.parametrize(("seed", "n_match"), [(0, 2), (1, 3), (2, 3), (3, 5), (4, 5)])
def test_it_agrees_with_every_k_tried_in_turn(model, seed, n_match):
    tokens = tokens_of(1, 115, seed)
    verdicts, answer = brute_force(model, tokens, CONFIG, n_match)
    result = minimal_k(model, tokens, CONFIG, n_match=n_match, linear=True)
    assert result.answer == answer
    assert result.k == min(k for k, passed in verdicts.items() if passed)
    assert result.fails_below == (True if result.k > CONFIG.forced_blocks else None)
    assert all(verdicts[trial.k] == trial.passed for trial in result.trials)
    found = minimal_k(model, tokens, CONFIG, n_match=n_match)
    assert verdicts[found.k]
    assert found.fails_below is None or not verdicts[found.k - 1]
    assert found.passes == len(found.trials) + 2


def test_full_k_is_the_dense_run(model):
    result = minimal_k(model, tokens_of(1, 100), CONFIG)
    full = result.trials[0]
    assert full.k == -(-101 // 8)
    assert full.kl < 1e-6
    assert full.logit_difference == pytest.approx(result.dense_logit_difference, abs=1e-3)


def test_a_budget_for_each_head_passes_and_is_lower(model):
    tokens = tokens_of(1, 115, 3)
    for per in ("layer", "head"):
        result = minimal_k(model, tokens, CONFIG, n_match=5, per=per)
        assert set(result.budgets) == {(layer, head) for layer in range(3) for head in range(4)}
        assert max(result.budgets.values()) <= result.k
        assert result.config.overrides == result.budgets
        if per == "layer":
            assert all(len({k for (n, _), k in result.budgets.items() if n == layer}) == 1 for layer in range(3))
        with sl.stream(model, result.config), torch.no_grad():
            grown = torch.cat([tokens, torch.tensor([result.answer[:-1]])], 1)
            assert tuple(model(grown)[0, -5:].argmax(-1).tolist()) == result.answer
        assert len(result.budgets_frame()) == 12


@pytest.mark.hooked
@pytest.mark.parametrize("distance", [1, 4, 9])
def test_the_k_of_a_toy_is_the_distance_of_its_answer(distance):
    # Ten blocks of 8 and one more token; all tokens differ but for one block that repeats token 7.
    tokens = torch.arange(10, 91)[None]
    tokens[0, 8 * (10 - distance) : 8 * (11 - distance)] = 7
    config = sl.StreamConfig(q_block=8, k_block=8, selector="window_sinks")
    result = minimal_k(counting_model(), tokens, config, linear=True)
    # The sink and the diagonal, and the blocks from the one before the diagonal back to the answer's.
    assert result.k == 2 + distance
    assert result.answer == (7, 7)
    assert result.fails_below
    assert result.monotone


def test_bisection_finds_a_threshold_and_names_the_k_that_failed(monkeypatch):
    model = tiny_bridge("LlamaForCausalLM")
    module = sys.modules[MinimalK.__module__]
    real = module._Search.passes

    def passes(self, config, k=None, layer=None, head=None):
        real(self, config, k, layer, head)
        trial = self.trials.pop()
        kept = trial.k >= 6 or trial.k == 3
        self.trials.append(module.replace(trial, passed=kept))
        return kept

    monkeypatch.setattr(module._Search, "passes", passes)
    result = minimal_k(model, tokens_of(1, 115), CONFIG)
    assert (result.k, result.fails_below, result.monotone) == (6, True, True)
    scanned = minimal_k(model, tokens_of(1, 115), CONFIG, linear=True)
    assert (scanned.k, scanned.fails_below, scanned.monotone) == (3, True, False)
    bounded = minimal_k(model, tokens_of(1, 115), CONFIG, low=7)
    assert (bounded.k, bounded.fails_below) == (7, None)
    with pytest.raises(ValueError, match="raise high"):
        minimal_k(model, tokens_of(1, 115), CONFIG, high=5)


def test_decoding_gives_the_same_verdict_where_all_blocks_are_kept():
    model = tiny_bridge("LlamaForCausalLM")
    one = minimal_k(model, tokens_of(1, 60), CONFIG, low=9)
    other = minimal_k(model, tokens_of(1, 60), CONFIG, low=9, by_generating=True)
    assert (one.k, one.answer) == (other.k, other.answer)
    assert other.passes == 2 + 2 * len(other.trials)


def test_the_tables_and_json_hold_every_trial():
    result = minimal_k(tiny_bridge("LlamaForCausalLM"), tokens_of(1, 60), CONFIG, per="layer")
    frame = result.to_frame()
    assert list(frame["k"]) == [trial.k for trial in result.trials]
    document = json.loads(result.to_json())
    assert document["k"] == result.k
    assert sl.StreamConfig.from_json(document["config"]) == result.config
    assert len(document["trials"]) == len(frame)
    assert 0 < result.kept_fraction <= 1


def test_what_cannot_take_effect_is_refused():
    model = tiny_bridge("LlamaForCausalLM")
    tokens = tokens_of(1, 60)
    with sl.stream(model, CONFIG), pytest.raises(RuntimeError, match="leave the `with` block"):
        minimal_k(model, tokens)
    with pytest.raises(ValueError, match="takes one text"):
        minimal_k(model, tokens_of(2, 60), CONFIG)
    with pytest.raises(ValueError, match="low=1"):
        minimal_k(model, tokens, CONFIG, low=1)
    with pytest.raises(ValueError, match="leave them out"):
        minimal_k(model, tokens, sl.StreamConfig(q_block=8, k_block=8, overrides={(0, 0): 4}), per="head")
    with pytest.raises(ValueError, match="n_match"):
        minimal_k(model, tokens, CONFIG, n_match=0)
    with pytest.raises(TypeError, match="token ids"):
        minimal_k(model, "a text", CONFIG)

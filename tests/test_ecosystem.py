"""Beside other tools: plain transformers models, SAE-like hooks, CircuitsVis."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stream_lens as sl
from stream_lens.adapters import circuitsvis_attention

sys.path.insert(0, str(Path(__file__).parent / "backend"))
from tiny_models import CONFIGS, VOCAB, tiny_bridge, tiny_hf_model

TOKENS = torch.randint(3, VOCAB, (2, 70), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_plain_transformers_model_equals_dense_at_full_k(architecture: str) -> None:
    model = tiny_hf_model(architecture)
    with torch.no_grad():
        before = model(TOKENS).logits
        with sl.stream_transformers(model, q_block=16, k_block=8, k=12) as streamed:
            full = model(TOKENS).logits
            assert sorted(streamed.patterns) == [0, 1, 2]
        with sl.stream_transformers(model, q_block=16, k_block=8, k=4):
            sparse = model(TOKENS).logits
        after = model(TOKENS).logits
    assert (full - before).abs().max() <= 1e-5
    assert (sparse - before).abs().max() > 1e-4
    assert torch.equal(before, after)


def test_plain_patterns_are_edited_in_place_and_by_return() -> None:
    model = tiny_hf_model("LlamaForCausalLM")

    def zero(layer: int, pattern: sl.SparsePattern) -> None:
        pattern[:, 1] = 0

    def scaled(layer: int, pattern: sl.SparsePattern) -> sl.SparsePattern:
        return pattern.scale(0.0, heads=1)

    with torch.no_grad():
        with sl.stream_transformers(model, q_block=16, k_block=8, k=12):
            plain = model(TOKENS).logits
        with sl.stream_transformers(model, q_block=16, k_block=8, k=12, on_pattern=zero) as streamed:
            in_place = model(TOKENS).logits
            assert streamed.patterns[0].to_dense()[:, 1].abs().max() == 0
        with sl.stream_transformers(model, q_block=16, k_block=8, k=12, on_pattern=scaled):
            returned = model(TOKENS).logits
    assert torch.equal(in_place, returned)
    assert not torch.allclose(in_place, plain)


def test_plain_model_generates_with_its_cache() -> None:
    model = tiny_hf_model("MistralForCausalLM")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dense = model.generate(TOKENS, **options)
    with sl.stream_transformers(model, q_block=16, k_block=8, k=12):
        assert torch.equal(model.generate(TOKENS, **options), dense)


def test_plain_model_is_given_back_after_an_error() -> None:
    model = tiny_hf_model("LlamaForCausalLM")
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), sl.stream_transformers(model, k=4):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    assert model(TOKENS).logits.shape[1] == 70


def test_what_a_plain_model_must_be() -> None:
    no_model = torch.nn.Linear(2, 2)
    with (
        pytest.raises(sl.UnsupportedArchitectureError, match="untested"),
        sl.stream_transformers(torch.nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.raises(sl.UnsupportedArchitectureError, match="no attention layers"),
        sl.stream_transformers(no_model, allow_untested=True),
    ):
        pass
    model = tiny_hf_model("LlamaForCausalLM")
    with (
        sl.stream_transformers(model, k=4),
        pytest.raises(RuntimeError, match="streamed already"),
        sl.stream_transformers(model, k=4),
    ):
        pass


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"layers": (99,)}, ValueError, r"layers \[99\] do not exist"),
        ({"overrides": {(9, 0): 8}}, ValueError, r"layers \[9\], which are not streamed"),
        ({"kernel": "fast"}, ValueError, "kernel='fast' is not known"),
        ({"selector": "best"}, ValueError, "selector='best' is not known"),
        ({"observe": True}, TypeError, "observe is no choice of stream"),
        ({"config": {"k": 8}}, TypeError, "not a StreamConfig"),
    ],
)
def test_choices_of_a_plain_model_are_checked(choices: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message), sl.stream_transformers(tiny_hf_model("LlamaForCausalLM"), **choices):
        pass


def test_a_model_inside_a_bridge_is_not_a_plain_one() -> None:
    bridge = tiny_bridge("LlamaForCausalLM")
    with pytest.raises(TypeError, match="on the bridge"), sl.stream_transformers(bridge.original_model):
        pass


def test_sae_like_module_hooks_the_residual_while_streaming() -> None:
    """What SAELens does: replace an activation by an autoencoder's reconstruction, and cache its features."""
    model = tiny_bridge("LlamaForCausalLM")
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
    features = {}

    def splice(residual: torch.Tensor, hook: object) -> torch.Tensor:
        features["acts"] = torch.relu(encoder(residual))
        return decoder(features["acts"])

    hooks = [("blocks.1.hook_out", splice)]
    with torch.no_grad():
        dense = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
        dense_features = features["acts"]
        with sl.stream(model, q_block=16, k_block=8, k=12):
            streamed = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert (streamed - dense).abs().max() <= 1e-5
    assert (features["acts"] - dense_features).abs().max() <= 1e-5


def test_circuitsvis_takes_a_pattern() -> None:
    model = tiny_bridge("LlamaForCausalLM")
    with torch.no_grad(), sl.stream(model, q_block=16, k_block=8, k=4):
        _, cache = model.run_with_cache(TOKENS[:1])
    words = [f"t{n}" for n in TOKENS[0].tolist()]
    with pytest.raises(ValueError, match="which layer"):
        _drawn(cache, words)
    with pytest.raises(ValueError, match="69 tokens"):
        _drawn(cache, words[1:], 0)
    assert "attention" in str(_drawn(cache, words, 0, heads=[0, 2])).lower()


def _drawn(*args: object, **options: object) -> object:
    pytest.importorskip("circuitsvis", reason="needs circuitsvis")
    return circuitsvis_attention(*args, **options)  # type: ignore[arg-type]

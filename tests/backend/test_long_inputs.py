"""run_with_masks: the last logits of a long input, its patterns, and no silent cut; and what it will take."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from stream_lens import FractionOfPrefix, MassThreshold, StreamConfig, memory_estimate, run_with_masks, stream
from stream_lens.backend import SparseActivationCache
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.runs import worst
from tests.backend.tiny_models import CONFIGS, tiny_bridge, tiny_tokenizer

T = 200
CHOICES: dict[str, Any] = {"q_block": 16, "k_block": 8, "k": 5}
HOOKED = pytest.param("hooked", marks=pytest.mark.hooked)


@cache
def model_of(name: str) -> Any:
    if name != "hooked":
        return tiny_bridge(name)
    model = hooked_model("local")
    model.set_tokenizer(tiny_tokenizer())
    return model


@pytest.mark.parametrize("name", [*CONFIGS, HOOKED])
def test_the_last_logits_and_the_patterns_are_those_of_the_whole_run(name: str) -> None:
    model, tokens = model_of(name), tokens_of(2, T)
    with torch.no_grad(), stream(model, **CHOICES):
        whole, cached = model.run_with_cache(tokens)
        inside, _ = run_with_masks(model, tokens, last_logits=3)
    logits, ours = run_with_masks(model, tokens, **CHOICES)
    assert logits.shape[:2] == (2, 1)
    assert worst((logits, whole[:, -1:]), (inside, whole[:, -3:])) <= 1e-5
    assert isinstance(ours, SparseActivationCache)
    assert list(ours.patterns()) == [0, 1, 2]
    assert len(ours) == 3
    for layer in range(3):
        assert torch.equal(ours["pattern", layer].mask.indices, cached["pattern", layer].mask.indices)
    with torch.no_grad():
        assert model(tokens).shape[1] == T  # all logits again


@pytest.mark.parametrize("name", ["LlamaForCausalLM", HOOKED])
def test_layers_that_run_dense_leave_no_pattern(name: str) -> None:
    _, ours = run_with_masks(model_of(name), tokens_of(1, T), layers=(1,), **CHOICES)
    assert list(ours.cache_dict) == ["blocks.1.attn.hook_pattern"]
    asked = "blocks.0.attn.hook_pattern"
    _, ours = run_with_masks(model_of(name), tokens_of(1, 40), layers=(1,), names_filter=asked, **CHOICES)
    assert ours[asked].shape == (1, 4, 40, 40)


def test_one_text_and_one_row_of_tokens() -> None:
    model, text = model_of("LlamaForCausalLM"), "t5 t6 t7 t8"
    tokens = model.to_tokens(text)
    of_text, cached = run_with_masks(model, text, **CHOICES)
    of_tokens, _ = run_with_masks(model, tokens[0], **CHOICES)
    assert torch.equal(of_text, of_tokens)
    assert cached.info.tokens is not None
    assert torch.equal(cached.info.tokens, tokens)
    without, _ = run_with_masks(model, text, prepend_bos=False, **CHOICES)
    assert not torch.equal(without, of_text)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM", HOOKED])
def test_padding_of_several_texts_is_masked(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    monkeypatch.setattr(model.tokenizer, "padding_side", side)
    texts = [" ".join(f"t{i % 90 + 3}" for i in range(60)), "t5 t6 t7"]
    full = {**CHOICES, "k": 16}
    with torch.no_grad():
        dense = model(texts)[:, -1:]
    logits, cached = run_with_masks(model, texts, **full)
    row = 0 if side == "right" else slice(None)  # a right-padded row ends in padding, which nothing defines
    assert worst((logits[row], dense[row])) <= 2e-5
    with stream(model, **full), torch.no_grad():
        _, whole = model.run_with_cache(texts)
    for layer in range(3):
        assert torch.equal(cached["pattern", layer].to_dense(), whole["pattern", layer].to_dense())
    assert cached.info.tokens is not None
    assert torch.equal(cached.info.tokens, model.to_tokens(texts))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([3, 4, 5], TypeError, "a list was given"),
        (torch.rand(2, 3), TypeError, "float32"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, "no tokens"),
    ],
)
def test_what_is_no_text_raises(given: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run_with_masks(model_of("LlamaForCausalLM"), given, **CHOICES)
    with pytest.raises(ValueError, match=r"last_logits=1\.5"):
        run_with_masks(model_of("LlamaForCausalLM"), tokens_of(1, 9), last_logits=1.5, **CHOICES)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", HOOKED])
@pytest.mark.parametrize(
    "wanted", ["blocks.1.attn.hook_z", ["blocks.1.attn.hook_z"], lambda name: name == "blocks.1.attn.hook_z"]
)
def test_more_than_patterns_may_be_asked_for(name: str, wanted: Any) -> None:
    _, cached = run_with_masks(model_of(name), tokens_of(1, T), names_filter=wanted, **CHOICES)
    assert len(cached) == 4
    assert cached["z", 1].shape == (1, T, 4, 16)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM", HOOKED])
def test_progress_is_told_layer_by_layer(name: str) -> None:
    done: list[int] = []
    run_with_masks(model_of(name), tokens_of(1, 40), on_layer=done.append, **CHOICES)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", HOOKED])
def test_an_input_longer_than_the_context_raises(name: str) -> None:
    model = model_of(name)
    with pytest.raises(ValueError, match=r"600 tokens .* context is 512"):
        run_with_masks(model, tokens_of(1, 600), **CHOICES)
    with pytest.raises(ValueError, match=r"601 tokens .* context is 512"):
        run_with_masks(model, " ".join(["t5"] * 600), prepend_bos=True, **CHOICES)


def test_choices_for_a_streamed_model_and_no_logits_raise() -> None:
    model = model_of("LlamaForCausalLM")
    with stream(model, **CHOICES):
        with pytest.raises(ValueError, match="streamed already"):
            run_with_masks(model, tokens_of(1, 40), k=3)
        with pytest.raises(ValueError, match="streamed already"):
            run_with_masks(model, tokens_of(1, 40), StreamConfig())
    with pytest.raises(ValueError, match="at least 1"):
        run_with_masks(model, tokens_of(1, 40), last_logits=0)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", HOOKED])
@pytest.mark.parametrize(
    ("length", "choices"),
    [
        (200, {}),
        (203, {"k": 7, "layers": (0, 2)}),
        (40, {"k": 64}),
        (200, {"k": FractionOfPrefix(0.25, minimum=4)}),
        (200, {"overrides": {(1, 0): 9}}),
    ],
)
def test_the_estimate_of_mask_bytes_is_what_masks_take(name: str, length: int, choices: dict[str, Any]) -> None:
    model, config = model_of(name), StreamConfig(**{**CHOICES, **choices})
    estimate = memory_estimate(model, length, config, batch=2)
    _, cached = run_with_masks(model, tokens_of(2, length), config)
    real = sum(pattern.nbytes for pattern in cached.patterns().values())
    if name == "Gemma2ForCausalLM":  # where windows, which a bridge's cfg does not tell, leave fewer blocks to keep
        assert real <= estimate.masks
    else:
        assert real == estimate.masks
    assert sum(pattern.scores_nbytes for pattern in cached.patterns().values()) == estimate.queries_keys
    assert estimate.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.total > estimate.weights + estimate.masks


def test_a_mass_threshold_is_estimated_at_its_most() -> None:
    model, config = model_of("LlamaForCausalLM"), StreamConfig(**{**CHOICES, "k": MassThreshold(0.5, maximum=9)})
    _, cached = run_with_masks(model, tokens_of(1, T), config)
    real = sum(pattern.nbytes for pattern in cached.patterns().values())
    assert real <= memory_estimate(model, T, config).masks
    assert memory_estimate(model, T, config).masks == memory_estimate(model, T, config.with_k(9)).masks


def test_the_estimate_of_dense_patterns_is_what_dense_patterns_take() -> None:
    model = tiny_bridge("LlamaForCausalLM", attn_implementation="eager")
    with torch.no_grad():
        cached = model.run_with_cache(tokens_of(1, T))[1]
    real = sum(x.nbytes for name, x in cached.items() if name.endswith(("hook_pattern", "hook_attn_scores")))
    assert memory_estimate(model, T).dense_patterns == real

"""Installing and leaving: once, whole, also after errors; copies, shared configs, some layers only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import stream_lens as sl
from stream_lens import StreamConfig
from stream_lens.backend import delegated, layer
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.runs import with_hook, worst
from tests.backend.tiny_models import tiny_bridge, tiny_hf_model, tiny_tokenizer

SMALL: dict[str, Any] = {"q_block": 8, "k_block": 8, "k": 3}
FULL: dict[str, Any] = {"q_block": 8, "k_block": 8, "k": 16}
MODELS = ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", pytest.param("hooked", marks=pytest.mark.hooked)]


def model_of(name: str, **changes: Any) -> Any:
    return hooked_model("llama") if name == "hooked" else tiny_bridge(name, **changes)


def tokens() -> torch.Tensor:
    return tokens_of(2, 61)


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), **options)


def parts(model: Any) -> list[Any]:
    """Classes, attribute names, hooks and implementation: what installing changes."""
    modules = [(type(module), sorted(module.__dict__), len(module._forward_hooks)) for module in model.modules()]
    config = getattr(getattr(model, "original_model", None), "config", None)
    return [modules, type(model), sorted(model.__dict__), getattr(config, "_attn_implementation", None)]


@pytest.mark.parametrize("name", MODELS)
def test_leaving_restores_everything(name: str) -> None:
    model = model_of(name)
    dense, before = logits(model), parts(model)  # in this order: the first run marks some of a bridge's parts
    handle = sl.install(model, **SMALL)
    assert handle.layers == [0, 1, 2]
    assert sl.is_streamed(model)
    assert worst((logits(model), dense)) > 1e-4
    handle.uninstall()
    handle.uninstall()  # again does nothing
    assert (parts(model), handle.layers, sl.is_streamed(model)) == (before, [], False)
    assert torch.equal(logits(model), dense)
    with pytest.raises(RuntimeError, match="not streamed"):
        sl.uninstall(model)


@pytest.mark.parametrize("name", MODELS)
def test_an_error_inside_leaves_the_model_as_it_was(name: str) -> None:
    model = model_of(name)
    dense, before = logits(model), parts(model)

    def fail(x: Any) -> None:
        raise KeyError("of the user's")

    with pytest.raises(KeyError, match="of the user's"), sl.stream(model, **SMALL):
        with_hook(model, tokens(), fail)
    assert parts(model) == before
    assert torch.equal(logits(model), dense)
    streamed = sl.install(model, **SMALL)
    expected = logits(model)
    with pytest.raises(KeyError):
        with_hook(model, tokens(), fail)
    assert torch.equal(logits(model), expected)  # and the next run inside is whole
    streamed.uninstall()
    assert parts(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_interrupts_leave_the_model_as_it_was(name: str) -> None:
    model = model_of(name)
    dense, before = logits(model), parts(model)

    def stop(x: Any) -> None:
        raise KeyboardInterrupt

    with sl.stream(model, **SMALL):
        expected = logits(model)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                with_hook(model, tokens(), stop)
            model.reset_hooks()
        assert torch.equal(logits(model), expected)
        assert parts(model)[-1] != "stream_lens"
    assert parts(model) == before
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("name", MODELS)
def test_a_hook_may_run_the_model_again(name: str) -> None:
    model, inside = model_of(name), []

    def again(pattern: Any) -> None:
        if not inside:
            inside.append(None)
            with torch.no_grad():
                inside.append(model(tokens()))

    with sl.stream(model, **SMALL):
        expected = logits(model)
        assert torch.equal(with_hook(model, tokens(), again), expected)
        assert torch.equal(inside[1], expected)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_nesting_and_installing_twice_raise(name: str) -> None:
    model = model_of(name)
    with sl.stream(model, **SMALL):
        expected = logits(model)
        with pytest.raises(RuntimeError, match="streamed already"):
            sl.install(model, k=4)
        assert torch.equal(logits(model), expected)
    with sl.stream(model, **SMALL):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_made_inside_is_streamed_on_its_own(name: str) -> None:
    model = model_of(name)
    dense = logits(model)
    with sl.stream(model, **SMALL):
        sparse = logits(model)
        clone = copy.deepcopy(model)
    assert torch.equal(logits(model), dense)
    assert torch.equal(logits(clone), sparse)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(clone), sparse)  # with weights of its own
    with torch.no_grad():
        cache = clone.run_with_cache(tokens())[1]
    assert isinstance(cache["pattern", 0], sl.SparsePattern)
    sl.uninstall(clone)
    assert torch.equal(logits(clone), dense)
    assert "Streamed" not in str([type(module) for module in clone.modules()])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_a_dense_model_that_shares_the_config_stays_dense(name: str) -> None:
    first = tiny_hf_model(name)
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    second.config = first.config
    a, b = (
        TransformerBridge.boot_transformers(f"tiny-{i}", hf_model=m, tokenizer=tiny_tokenizer(), device="cpu").eval()
        for i, m in enumerate((first, second))
    )
    dense = logits(b)
    with sl.stream(a, **SMALL):
        sparse = logits(a)
        for _ in range(2):
            assert torch.equal(logits(b), dense)
            assert torch.equal(logits(a), sparse)
        assert first.config._attn_implementation != "stream_lens"
    assert torch.equal(logits(a), dense)
    assert worst((sparse, dense)) > 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "GptOssForCausalLM", "OPTForCausalLM"])
@pytest.mark.parametrize("padded", [False, True])
def test_layers_that_stay_dense_are_bit_identical(name: str, implementation: str, padded: bool) -> None:
    if name == "GptOssForCausalLM" and implementation == "sdpa":
        pytest.skip("transformers runs attention sinks eagerly only")
    model = model_of(name, attn_implementation=implementation)
    mask = torch.ones(2, 61, dtype=torch.long)
    if padded:
        mask[1, :20] = 0
    with torch.no_grad():
        dense = model.run_with_cache(tokens(), attention_mask=mask)[1]
        with sl.stream(model, **SMALL, layers=(1, 2)) as handle:
            cache = model.run_with_cache(tokens(), attention_mask=mask)[1]
            assert handle.layers == [1, 2]
        with sl.stream(model, **FULL, layers=(1,)):
            full = model(tokens(), attention_mask=mask)
    assert list(cache.patterns()) == [1, 2]
    for hook in ("attn.hook_z", "hook_resid_post"):
        assert torch.equal(cache[f"blocks.0.{hook}"], dense[f"blocks.0.{hook}"])
    again = logits(model, attention_mask=mask)
    real = mask.bool()
    assert worst((full[real], again[real])) <= 1e-5


@pytest.mark.hooked
def test_layers_that_stay_dense_are_bit_identical_hooked() -> None:
    model = hooked_model("local")
    with torch.no_grad():
        dense = model.run_with_cache(tokens())[1]
        with sl.stream(model, **SMALL, layers=(1,)):
            cache = model.run_with_cache(tokens())[1]
    assert list(cache.patterns()) == [1]
    assert torch.equal(cache["pattern", 0], dense["pattern", 0])


@pytest.mark.parametrize("name", MODELS)
def test_stopping_at_a_layer(name: str) -> None:
    model = model_of(name)
    with torch.no_grad():
        dense = model(tokens(), stop_at_layer=2)
        with sl.stream(model, **FULL):
            assert worst((model(tokens(), stop_at_layer=2), dense)) <= 1e-5
            cache = model.run_with_cache(tokens(), stop_at_layer=2)[1]
            assert list(cache.patterns()) == [0, 1]
            whole = logits(model)
    assert worst((whole, logits(model))) <= 1e-5


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"kk": 3}, TypeError, "kk is no choice"),
        ({"k": 0}, ValueError, "k=0"),
        ({"layers": (7,)}, ValueError, r"layers \[7\] do not exist"),
        ({"layers": (0,), "overrides": {(1, 0): 4}}, ValueError, "not streamed"),
        ({"overrides": {(1, 9): 4}}, ValueError, "head"),
        ({"kernel": "fast"}, ValueError, "kernel='fast'"),
        ({"selector": "none"}, ValueError, "selector='none'"),
    ],
)
def test_choices_that_cannot_be_raise_when_installing(choices: dict[str, Any], error: type, message: str) -> None:
    model = model_of("LlamaForCausalLM")
    before = parts(model)
    with pytest.raises(error, match=message):
        sl.install(model, **choices)
    assert parts(model) == before


def test_a_config_and_choices_together() -> None:
    with sl.stream(model_of("LlamaForCausalLM"), StreamConfig(q_block=8, k_block=8, k=3), k=5) as handle:
        assert (handle.config.q_block, handle.config.k) == (8, 5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("GPT2LMHeadModel", {"attn_pdrop": 0.5}), ("OPTForCausalLM", {"attention_dropout": 0.5})],
)
def test_dropout_in_training_raises(name: str, changes: dict[str, Any]) -> None:
    model = model_of(name, **changes)
    with sl.stream(model, **SMALL):
        logits(model)
        model.train()
        with pytest.raises(RuntimeError, match="eval"):
            logits(model)


@pytest.mark.parametrize("name", MODELS)
def test_an_attention_that_skips_the_kernel_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    sl.install(model, **SMALL)
    attn = model.blocks[1].attn

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros(2, 61, 64) if name == "hooked" else (torch.zeros(2, 61, 64), None)

    from stream_lens.backend.session import checked_forward

    monkeypatch.setattr(type(attn), "forward", checked_forward(forward))
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn .*dense"):
        logits(model)


def test_a_model_that_never_reaches_a_layer_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("LlamaForCausalLM")
    sl.install(model, **SMALL)
    monkeypatch.setattr(type(model.blocks[2].attn), "forward", lambda self, *a, **k: (torch.zeros(2, 61, 64), None))
    with pytest.raises(RuntimeError, match=r"blocks\.2\.attn did not run"):
        logits(model)


def test_an_attention_that_runs_twice_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("OPTForCausalLM")

    def twice(*args: Any, **kwargs: Any) -> Any:
        layer.attend(*args, **kwargs)
        return layer.attend(*args, **kwargs)

    monkeypatch.setattr(delegated, "attend", twice)
    with sl.stream(model, **SMALL), pytest.raises(RuntimeError):
        logits(model)

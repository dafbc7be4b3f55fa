"""No streamed path makes a tensor of T² entries, nor logits of every position where only the last are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stream_lens import run_with_masks, stream
from tests.backend.hooked_models import VOCAB, hooked_model, tokens_of
from tests.backend.tiny_models import tiny_bridge

T = 4096
CHOICES: dict[str, Any] = {"q_block": 64, "k_block": 64, "k": 4}
MLP = 40  # not the number of tokens in the vocabulary, which the last test looks for in shapes
ONE_LAYER = {"num_hidden_layers": 1, "max_position_embeddings": T, "num_attention_heads": 1, "hidden_size": 16}
MODELS = [
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    pytest.param("hooked", marks=pytest.mark.hooked),
    pytest.param("hooked-local", marks=pytest.mark.hooked),
]


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.entries, self.what = 0, ""
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":  # which holds shapes only
                self.shapes.add(tuple(x.shape))
                # Its storage, so that an expanded view counts as what it takes.
                entries = x.untyped_storage().nbytes() // x.element_size()
                if entries > self.entries:
                    self.entries, self.what = entries, f"{func} gave {list(x.shape)}"
        return out


def model_of(name: str, layers: int = 1) -> Any:
    if name.startswith("hooked"):
        variant = "local" if name == "hooked-local" else "llama"
        changes = {"attn_types": ["local"] * layers} if variant == "local" else {}
        return hooked_model(variant, n_layers=layers, n_heads=1, n_key_value_heads=1, d_mlp=MLP, n_ctx=T, **changes)
    if name == "GPT2LMHeadModel":
        return tiny_bridge(name, n_layer=layers, n_head=1, n_embd=16, n_positions=T)
    changes = {**ONE_LAYER, "num_hidden_layers": layers}
    if name == "OPTForCausalLM":
        # Eager, since the dense run of other implementations makes no pattern that the watch could see.
        return tiny_bridge(name, **changes, word_embed_proj_dim=16, ffn_dim=MLP, attn_implementation="eager")
    return tiny_bridge(name, **changes, num_key_value_heads=1, intermediate_size=MLP)


def largest(run: Callable[[], Any]) -> Largest:
    with torch.no_grad(), Largest() as watch:
        run()
    return watch


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_t_squared_entries_is_made(name: str) -> None:
    model, tokens = model_of(name), tokens_of(1, T)
    with stream(model, **CHOICES):
        for run in (lambda: model(tokens), lambda: model.run_with_cache(tokens)):
            watch = largest(run)
            assert 0 < watch.entries < T * T, watch.what


@pytest.mark.parametrize("name", ["LlamaForCausalLM", pytest.param("hooked", marks=pytest.mark.hooked)])
def test_the_torch_kernel_padding_and_observing_stay_below_too(name: str) -> None:
    model, tokens = model_of(name), tokens_of(1, T)
    with stream(model, **CHOICES, kernel="torch"):
        watch = largest(lambda: model.run_with_cache(tokens))
        assert watch.entries < T * T, watch.what
    with stream(model, **CHOICES, observe=True):
        watch = largest(lambda: model.run_with_cache(tokens))
        assert watch.entries < T * T, watch.what
    if name == "hooked":
        from tests.backend.tiny_models import tiny_tokenizer

        model.set_tokenizer(tiny_tokenizer())
    mask = torch.ones_like(tokens)
    mask[:, :100] = 0
    with stream(model, **CHOICES):
        watch = largest(lambda: model(tokens, attention_mask=mask))
        assert watch.entries < T * T, watch.what


@pytest.mark.parametrize("name", ["LlamaForCausalLM", pytest.param("hooked", marks=pytest.mark.hooked)])
def test_gradients_stay_below_too(name: str) -> None:
    model, tokens = model_of(name), tokens_of(1, T)
    with stream(model, **CHOICES), Largest() as watch:
        model(tokens).sum().backward()
    assert watch.entries < T * T, watch.what


@pytest.mark.parametrize("name", MODELS)
def test_the_watch_sees_the_dense_pattern(name: str) -> None:
    """What shows that the tests above can fail: the dense model, and a model with a layer left dense."""
    model, tokens = model_of(name, layers=2), tokens_of(1, T)
    assert largest(lambda: model.run_with_cache(tokens)).entries >= T * T
    with stream(model, **CHOICES, layers=(0,)):
        assert largest(lambda: model.run_with_cache(tokens)).entries >= T * T


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "OPTForCausalLM", pytest.param("hooked", marks=pytest.mark.hooked)]
)
def test_a_run_with_masks_makes_the_last_logits_only(name: str) -> None:
    model, tokens = model_of(name), tokens_of(1, T)
    watch = largest(lambda: run_with_masks(model, tokens, **CHOICES))
    assert (1, 1, VOCAB) in watch.shapes
    assert not any(VOCAB in shape and T in shape for shape in watch.shapes)
    assert watch.entries < T * T, watch.what
    dense = largest(lambda: model(tokens[:, :64]))
    assert any(VOCAB in shape and 64 in shape for shape in dense.shapes)

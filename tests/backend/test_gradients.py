"""Gradients through a streamed model at full k are the dense ones, and gates have gradients of their own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from stream_lens import SparsePattern, stream
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.runs import PATTERN, SCORES, worst
from tests.backend.tiny_models import CONFIGS, tiny_bridge

FULL: dict[str, Any] = {"q_block": 16, "k_block": 8, "k": 16}
T = 61
MODELS = [*CONFIGS, *(pytest.param(f"hooked-{n}", marks=pytest.mark.hooked) for n in ("llama", "local", "softcap"))]


@cache
def model_of(name: str) -> Any:
    return hooked_model(name.removeprefix("hooked-")) if name.startswith("hooked-") else tiny_bridge(name)


def without_pattern(name: str) -> bool:
    return not name.endswith((PATTERN, SCORES))


def loss_of(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)[..., 7].mean()


def activation_gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What run_with_cache(incl_bwd=True) does, with a loss of our own: gradients of every activation that has one."""
    found: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        if isinstance(gradient, Tensor):
            found[hook.name] = gradient.detach().clone()

    with model.hooks(bwd_hooks=[(without_pattern, keep)]):
        loss_of(model(tokens)).backward()
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_activations(name: str) -> None:
    model, tokens = model_of(name), tokens_of(2, T)
    dense = activation_gradients(model, tokens)
    with stream(model, **FULL):
        ours = activation_gradients(model, tokens)
    assert set(ours) == set(dense)
    assert len(dense) > 20
    scale = max(float(gradient.abs().max()) for gradient in dense.values())
    assert scale > 0
    for hook, gradient in dense.items():
        assert worst((ours[hook], gradient)) <= 1e-5 * max(1.0, scale), hook


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_parameters(name: str) -> None:
    model, tokens = model_of(name), tokens_of(2, T)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss_of(model(tokens)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    dense = gradients()
    with stream(model, **FULL):
        ours = gradients()
    model.zero_grad()
    assert set(ours) == set(dense)
    assert len(dense) > 10
    scale = max(float(gradient.abs().max()) for gradient in dense.values())
    for parameter, gradient in dense.items():
        assert worst((ours[parameter], gradient)) <= 1e-5 * max(1.0, scale), parameter


@pytest.mark.hooked
def test_a_cache_with_gradients() -> None:
    model, tokens = hooked_model("llama"), tokens_of(2, T)

    def cached() -> Any:
        return model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=without_pattern)[1]

    dense = cached()
    with stream(model, **FULL):
        ours = cached()
    assert list(ours.keys()) == list(dense.keys())
    assert any(name.endswith("_grad") for name in ours)
    assert worst(*((ours[name], dense[name]) for name in dense)) <= 2e-5


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "OPTForCausalLM"])
def test_a_gate_has_the_gradient_of_scaling_its_block(name: str) -> None:
    model, tokens = model_of(name), tokens_of(2, T)
    gates: list[Tensor] = []

    def gated(pattern: SparsePattern, hook: Any) -> SparsePattern:
        gates.append(torch.ones(pattern.mask.indices.shape, requires_grad=True))
        return pattern.with_gate(gates[-1])

    def loss_at(factor: float, block: tuple[int, ...]) -> float:
        def scaled(pattern: SparsePattern, hook: Any) -> SparsePattern:
            gate = torch.ones(pattern.mask.indices.shape)
            gate[block] = factor
            return pattern.with_gate(gate)

        with torch.no_grad():
            return float(loss_of(model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{PATTERN}", scaled)])).double())

    with stream(model, q_block=16, k_block=8, k=4):
        loss_of(model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{PATTERN}", gated)])).backward()
        model.zero_grad()
        gradient = gates[0].grad
        assert gradient is not None
        block = tuple(int(i) for i in torch.unravel_index(gradient.abs().argmax(), gradient.shape))
        slope = (loss_at(1.1, block) - loss_at(0.9, block)) / 0.2
    assert slope == pytest.approx(float(gradient[block]), rel=0.05)

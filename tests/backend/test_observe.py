"""observe=True: the dense output flows on, and masks come with their share of the dense pattern."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from stream_lens import stream
from tests.backend.hooked_models import VARIANTS, hooked_model, tokens_of
from tests.backend.runs import worst
from tests.backend.tiny_models import CONFIGS, tiny_bridge

T, Q, K = 90, 16, 8
MODELS = [
    *CONFIGS,
    *(pytest.param(name, marks=pytest.mark.hooked) for name in ("llama", "local", "softcap", "ungrouped")),
]


@cache
def model_of(name: str) -> Any:
    if name in VARIANTS:
        return hooked_model(name)
    return tiny_bridge(name, attn_implementation="eager")  # so that the dense run has a pattern to compare with


def shares(dense: Tensor, indices: Tensor) -> Tensor:
    """Sums of a dense pattern over blocks, in float64, one block at a time."""
    mass = torch.zeros(indices.shape, dtype=torch.float64)
    for b, h, i, n in (indices >= 0).nonzero().tolist():
        j = int(indices[b, h, i, n])
        mass[b, h, i, n] = dense[b, h, i * Q : (i + 1) * Q, j * K : (j + 1) * K].double().sum()
    return mass


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_dense_and_masses_are_shares_of_the_dense_pattern(name: str) -> None:
    model, tokens = model_of(name), tokens_of(2, T)
    with torch.no_grad():
        logits, dense = model.run_with_cache(tokens)
        with stream(model, q_block=Q, k_block=K, k=4, observe=True):
            ours, cache = model.run_with_cache(tokens)
    assert worst((ours, logits)) <= 1e-5
    assert cache.info.observe
    for layer in range(3):
        pattern = cache["pattern", layer]
        expected = shares(dense["pattern", layer], pattern.mask.indices)
        assert worst((pattern.block_mass, expected)) <= 1e-4
    # In layers without a window four blocks hold less than all.
    assert any(float(pattern.block_mass.sum()) < 0.99 * 2 * 4 * T for pattern in cache.patterns().values())


def test_a_padded_batch() -> None:
    model, tokens = model_of("LlamaForCausalLM"), tokens_of(2, T)
    mask = torch.ones_like(tokens)
    mask[1, :33] = 0
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask)
        with stream(model, q_block=Q, k_block=K, k=4, observe=True):
            ours, cache = model.run_with_cache(tokens, attention_mask=mask)
    assert worst((ours[mask.bool()], logits[mask.bool()])) <= 1e-5
    assert float(cache["pattern", 0].block_mass[1, :, :2].abs().max()) == 0.0  # rows 0 to 31 are padding


def test_it_decodes() -> None:
    model, tokens = model_of("MistralForCausalLM"), tokens_of(2, 40)
    with torch.no_grad():
        whole = model(tokens)
        with stream(model, q_block=Q, k_block=K, k=4, observe=True):
            past = model.original_model(tokens[:, :-1], use_cache=True).past_key_values
            step = model.original_model(tokens[:, -1:], past_key_values=past, use_cache=True).logits
    assert worst((step, whole[:, -1:])) <= 1e-5

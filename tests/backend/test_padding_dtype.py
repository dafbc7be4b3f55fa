"""Padding on either side, batches, and every float dtype: real positions get the dense logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stream_lens import stream
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.runs import worst
from tests.backend.tiny_models import CONFIGS, tiny_bridge, tiny_tokenizer

FULL: dict[str, Any] = {"q_block": 16, "k_block": 8, "k": 16}
LENGTH = 61
PADDINGS = {"left": (0, 23), "right": (40, LENGTH)}


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Three rows, the second padded over more than a window on one side; and the mask."""
    tokens = tokens_of(3, LENGTH)
    mask = torch.ones_like(tokens)
    start, stop = PADDINGS[side]
    tokens[1, start:stop], mask[1, start:stop] = 0, 0
    return tokens, mask


def real(logits: Tensor, mask: Tensor) -> Tensor:
    return logits[mask.bool()]


@pytest.mark.parametrize("side", list(PADDINGS))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_real_positions_of_a_padded_batch_are_dense(name: str, side: str) -> None:
    model = tiny_bridge(name)
    tokens, mask = padded(side)
    with torch.no_grad():
        dense = model(tokens, attention_mask=mask)
        with stream(model, **FULL):
            ours, cache = model.run_with_cache(tokens, attention_mask=mask)
    assert bool(torch.isfinite(ours).all())
    assert worst((real(ours, mask), real(dense, mask))) <= 2e-5
    pattern = cache["pattern", 1].to_dense()
    hidden = ~mask.bool()[:, None, None, :].expand_as(pattern)
    assert float(pattern[hidden].abs().max()) == 0.0


@pytest.mark.parametrize("side", list(PADDINGS))
def test_padding_is_never_a_kept_sink(side: str) -> None:
    model = tiny_bridge("LlamaForCausalLM")
    tokens, mask = padded(side)
    with torch.no_grad(), stream(model, q_block=8, k_block=8, k=3):
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
    pattern = cache["pattern", 1]
    row = slice(3, 5)  # query blocks 3 and 4: real in every row on both sides
    first = pattern.mask.indices[:, :, row, 0]
    assert first[0].unique().tolist() == [0]
    assert first[1].unique().tolist() == [2 if side == "left" else 0]
    assert torch.allclose(pattern.block_mass[:, :, row].sum(-1), torch.full((3, 4, 2), 8.0))


@pytest.mark.hooked
@pytest.mark.parametrize("side", list(PADDINGS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "local"])
def test_real_positions_of_a_padded_batch_are_dense_hooked(name: str, side: str) -> None:
    model = hooked_model(name)
    model.set_tokenizer(tiny_tokenizer(), default_padding_side=side)
    tokens, mask = padded(side)
    with torch.no_grad():
        dense = model(tokens, attention_mask=mask)
        with stream(model, **FULL):
            ours = model(tokens, attention_mask=mask)
    assert bool(torch.isfinite(ours).all())
    assert worst((real(ours, mask), real(dense, mask))) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_half_precision_is_as_near_to_float32_as_dense_is(name: str, dtype: torch.dtype) -> None:
    tokens = tokens_of(2, LENGTH)
    model = tiny_bridge(name)
    with torch.no_grad():
        exact = model(tokens)
        model.original_model.to(dtype)
        dense = model(tokens)
        with stream(model, **FULL):
            ours, cache = model.run_with_cache(tokens)
        assert torch.equal(model(tokens), dense)
    assert ours.dtype == dense.dtype
    assert cache["pattern", 0].to_dense().dtype == cache["pattern", 0].dtype
    assert worst((ours, exact)) <= 1.5 * worst((dense, exact)) + 1e-3


@pytest.mark.hooked
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_dense_is_hooked(dtype: torch.dtype) -> None:
    tokens = tokens_of(2, LENGTH)
    exact_model, model = hooked_model("llama"), hooked_model("llama", dtype=dtype)
    with torch.no_grad():
        model.load_state_dict(exact_model.state_dict())
        exact, dense = exact_model(tokens), model(tokens)
        with stream(model, **FULL):
            ours = model(tokens)
    assert ours.dtype == dense.dtype
    assert worst((ours, exact)) <= 1.5 * worst((dense, exact)) + 1e-3


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_float64_keeps_its_precision(name: str) -> None:
    model, tokens = tiny_bridge(name), tokens_of(2, LENGTH)
    model.original_model.to(torch.float64)
    with torch.no_grad():
        dense = model(tokens)
        with stream(model, **FULL):
            ours = model(tokens)
    # Some dense bridges make their softmax in float32, whatever the model's dtype.
    assert worst((ours, dense)) <= 2e-6
    assert ours.dtype == torch.float64

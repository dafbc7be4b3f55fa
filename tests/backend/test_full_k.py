"""With every block kept, a streamed model is the dense one: logits, cache, hooks, patterns; leaving gives it back."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_lens import stream
from stream_lens.backend.architectures import TESTED
from tests.backend.hooked_models import VARIANTS, hooked_model, tokens_of
from tests.backend.runs import PATTERN, SCORES, cached_gap, names_fired, worst
from tests.backend.tiny_models import CONFIGS, tiny_bridge

DELEGATED = "OPTForCausalLM"
MODELS = [
    *(pytest.param(name, id=name) for name in CONFIGS),
    *(pytest.param(name, id=f"hooked-{name}", marks=pytest.mark.hooked) for name in VARIANTS),
]


@cache
def model_of(name: str) -> Any:
    if name in VARIANTS:
        return hooked_model(name)
    # The dense run of delegated attention has no pattern to compare with unless transformers runs it eagerly.
    return tiny_bridge(name, attn_implementation="eager" if name == DELEGATED else None)


def compared(names: list[str], name: str) -> list[str]:
    """Without scores, which are never made; dense delegated attention fires that hook with probabilities."""
    return [hook for hook in names if not hook.endswith((PATTERN, SCORES))]


def test_every_tested_architecture_has_a_model_here() -> None:
    assert set(TESTED) == set(CONFIGS)


@pytest.mark.parametrize("name", MODELS)
def test_logits_cache_and_hooks_are_those_of_the_dense_model(name: str) -> None:
    model, tokens = model_of(name), tokens_of(2, 90)
    with torch.no_grad():
        logits, dense = model.run_with_cache(tokens)
        fired = names_fired(model, tokens)
        with stream(model, q_block=16, k_block=8, k=12):
            ours, sparse = model.run_with_cache(tokens)
            fired_ours = names_fired(model, tokens)
        after = model(tokens)
    assert worst((ours, logits)) <= (1e-12 if logits.dtype == torch.float64 else 1e-5)
    assert torch.equal(after, logits)
    assert set(sparse.keys()) == set(dense.keys())
    if name == DELEGATED:  # where dense fires the pattern first, then the scores, both after the fact
        assert sorted(fired_ours) == sorted(fired)
    else:
        assert list(sparse.keys()) == list(dense.keys())
        assert fired_ours == fired
    assert cached_gap(sparse, dense, compared(list(dense.keys()), name)) <= 2e-5
    for layer in range(3):
        assert worst((sparse["pattern", layer].to_dense(), dense["pattern", layer])) <= 2e-6
        assert sparse["pattern", layer].dtype == dense["pattern", layer].dtype


@settings(max_examples=12)
@given(
    name=st.sampled_from(["LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM", DELEGATED]),
    length=st.integers(1, 70),
    batch=st.integers(1, 3),
    q_block=st.sampled_from([1, 5, 16, 32]),
    k_block=st.sampled_from([1, 3, 8, 64]),
)
def test_any_length_batch_and_block_sizes(name: str, length: int, batch: int, q_block: int, k_block: int) -> None:
    model, tokens = model_of(name), tokens_of(batch, length, seed=length)
    with torch.no_grad():
        logits = model(tokens)
        with stream(model, q_block=q_block, k_block=k_block, k=128):
            assert worst((model(tokens), logits)) <= 1e-5
        assert torch.equal(model(tokens), logits)


@pytest.mark.hooked
@settings(max_examples=12)
@given(
    name=st.sampled_from(["local", "softcap", "ungrouped"]),
    length=st.integers(1, 70),
    batch=st.integers(1, 3),
    q_block=st.sampled_from([1, 5, 16, 32]),
    k_block=st.sampled_from([1, 3, 8, 64]),
)
def test_any_length_batch_and_block_sizes_hooked(
    name: str, length: int, batch: int, q_block: int, k_block: int
) -> None:
    test_any_length_batch_and_block_sizes.hypothesis.inner_test(name, length, batch, q_block, k_block)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_compatibility_mode_before_and_inside(name: str) -> None:
    model, tokens = tiny_bridge(name), tokens_of(2, 50)
    model.enable_compatibility_mode(no_processing=True)
    with torch.no_grad():
        logits = model(tokens)
        with stream(model, q_block=16, k_block=8, k=8):
            assert worst((model(tokens), logits)) <= 1e-5


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_both_cpu_kernels_give_the_dense_logits(kernel: str) -> None:
    from stream_lens.blocks.kernel_choice import why_not

    reason = why_not(kernel, torch.device("cpu"), torch.float32, 16)
    if reason:
        pytest.skip(reason)
    model, tokens = model_of("LlamaForCausalLM"), tokens_of(2, 90)
    with torch.no_grad():
        logits = model(tokens)
        with stream(model, q_block=16, k_block=8, k=12, kernel=kernel):
            assert worst((model(tokens), logits)) <= 1e-5

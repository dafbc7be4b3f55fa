"""Patching one run's pattern into another moves its probabilities, as patching dense patterns does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from stream_lens import SparsePattern, stream
from stream_lens.backend import NoScoresError, PatternIndexError
from stream_lens.backend.lazy_tensor import DenseNeededError
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.runs import PATTERN, with_hook, worst
from tests.backend.tiny_models import tiny_bridge

T, Q, K = 61, 16, 8
FULL: dict[str, Any] = {"q_block": Q, "k_block": K, "k": 16}
MODELS = ["LlamaForCausalLM", "GPT2LMHeadModel", pytest.param("hooked", marks=pytest.mark.hooked)]
ALL = slice(None)

Patch = Callable[[Any, Any], Any]


@cache
def model_of(name: str) -> Any:
    return hooked_model("llama") if name == "hooked" else tiny_bridge(name)


def clean(batch: int = 2) -> Tensor:
    return tokens_of(batch, T, seed=1)


def corrupted() -> Tensor:
    return tokens_of(2, T, seed=2)


def patch(target: tuple[Any, ...], origin: tuple[Any, ...]) -> Patch:
    def edit(pattern: Any, other: Any) -> None:
        pattern[target] = other[origin]

    return edit


def twice(pattern: Any, other: Any) -> None:
    """Two heads from the clean run, one of them zeroed and taken on to another head."""
    pattern[:, 0] = other[:, 2]
    pattern[:, 2] = other[:, 2]
    pattern[:, 2, 16:32] = 0
    pattern[:, 3] = pattern[:, 2]


PATCHES: dict[str, Patch] = {
    "whole": lambda pattern, other: other,
    "a head": patch((ALL, 1), (ALL, 1)),
    "a head into another": patch((ALL, 1), (ALL, 2)),
    "a head of its own run": lambda pattern, other: patch((ALL, 1), (ALL, 3))(pattern, pattern),
    "heads in another order": patch((ALL, [0, 2]), (ALL, [3, 1])),
    "a batch row": patch((1,), (1,)),
    "a batch row into another": patch((0,), (1,)),
    "rows": patch((ALL, ALL, slice(16, 48)), (ALL, ALL, slice(16, 48))),
    "rows of a head": patch((1, 2, slice(32, None)), (1, 2, slice(32, None))),
    "with the key axis written out": patch((ALL, 1, ALL, ALL), (ALL, 1, ALL, ALL)),
    "several": twice,
}


@pytest.mark.parametrize("edit", PATCHES.values(), ids=list(PATCHES))
@pytest.mark.parametrize("name", MODELS)
def test_a_patch_changes_the_logits_as_the_dense_patch_does(name: str, edit: Patch) -> None:
    model = model_of(name)
    with torch.no_grad():
        dense_cache = model.run_with_cache(clean())[1]
        dense = with_hook(model, corrupted(), lambda p: edit(p, dense_cache["pattern", 1]))
        with stream(model, **FULL):
            cache = model.run_with_cache(clean())[1]
            ours = with_hook(model, corrupted(), lambda p: edit(p, cache["pattern", 1]))
    assert worst((ours, dense)) <= 1e-5
    assert worst((with_hook(model, corrupted(), lambda p: None), dense)) > 1e-4


def test_from_a_run_of_one_text_into_a_batch() -> None:
    model = model_of("LlamaForCausalLM")

    def edit(pattern: Any, other: Any) -> None:
        pattern[1, 2] = other[0, 1]

    with torch.no_grad():
        dense_cache = model.run_with_cache(clean(1))[1]
        dense = with_hook(model, corrupted(), lambda p: edit(p, dense_cache["pattern", 0]))
        with stream(model, **FULL):
            cache = model.run_with_cache(clean(1))[1]
            flat = model.run_with_cache(clean(1), remove_batch_dim=True)[1]
            ours = with_hook(model, corrupted(), lambda p: edit(p, cache["pattern", 0]))

            def of_flat(pattern: Any) -> None:
                pattern[1, 2] = flat["pattern", 0][1]

            assert torch.equal(with_hook(model, corrupted(), of_flat), ours)
    assert worst((ours, dense)) <= 1e-5


def test_a_patched_pattern_reads_as_what_it_is_made_of() -> None:
    model = model_of("LlamaForCausalLM")
    seen: list[SparsePattern] = []

    def edit(pattern: SparsePattern) -> SparsePattern:
        pattern[:, 1] = other[:, 3]
        pattern[:, 2, 16:32] = 0
        seen.append(pattern.detach())
        return pattern

    with torch.no_grad(), stream(model, q_block=Q, k_block=K, k=5):
        other = model.run_with_cache(clean())[1]["pattern", 1]
        own = model.run_with_cache(corrupted())[1]["pattern", 1]
        with_hook(model, corrupted(), edit)
    patched = seen[0]
    expected = own.to_dense()
    expected[:, 1] = other.to_dense()[:, 3]
    mass = own.block_mass.clone()
    mass[:, 1] = other.block_mass[:, 3]
    assert worst((patched.block_mass, mass)) <= 1e-5
    expected[:, 2, 16:32] = 0
    assert worst((patched.to_dense(), expected)) <= 1e-6
    assert worst((patched[:, [2, 1]].to_dense(), expected[:, [2, 1]])) <= 1e-6
    assert worst((patched[:, [2, 1]].block_mass, mass[:, [2, 1]])) <= 1e-5


def test_a_mask_of_another_run_applied_to_this_runs_scores() -> None:
    model = model_of("LlamaForCausalLM")
    with torch.no_grad(), stream(model, q_block=Q, k_block=K, k=5, keep_scores=False):
        cache = model.run_with_cache(clean())[1]
        plain = with_hook(model, corrupted(), lambda p: None)
        own = model.run_with_cache(corrupted())[1]
        assert worst((with_hook(model, corrupted(), lambda p: p.with_mask(cache["pattern", 1].mask)), plain)) > 1e-3
        assert torch.equal(with_hook(model, corrupted(), lambda p: p.with_mask(own["pattern", 1].mask)), plain)


def test_without_scores_a_pattern_cannot_be_patched() -> None:
    model = model_of("LlamaForCausalLM")
    with torch.no_grad(), stream(model, **FULL, keep_scores=False):
        cache = model.run_with_cache(clean())[1]
        with pytest.raises(NoScoresError, match="keep_scores=True"):
            with_hook(model, corrupted(), lambda p: PATCHES["a head"](p, cache["pattern", 1]))


def test_runs_that_do_not_fit_raise() -> None:
    model = model_of("LlamaForCausalLM")
    with torch.no_grad():
        with stream(model, q_block=8, k_block=8, k=4):
            finer = model.run_with_cache(clean())[1]["pattern", 1]
        with stream(model, **FULL):
            shorter = model.run_with_cache(clean()[:, :50])[1]["pattern", 1]
            same = model.run_with_cache(clean())[1]["pattern", 1]
            for other in (finer, shorter):
                with pytest.raises(ValueError, match="same length and block sizes"):
                    with_hook(model, corrupted(), lambda p, other=other: PATCHES["a head"](p, other))
            with pytest.raises(ValueError, match=r"part of 2 × 1 .* from one of 1 × 1"):
                with_hook(model, corrupted(), lambda p: PATCHES["a head"](p, same[:1]))
            with pytest.raises(DenseNeededError, match=r"to_dense\(heads=2\)"):
                torch.zeros(same.shape)[:, 2] = same[:, 2]
            later = patch((ALL, ALL, slice(16, 32)), (ALL, ALL, slice(32, 48)))
            with pytest.raises(ValueError, match="position"):
                with_hook(model, corrupted(), lambda p: later(p, same))
    windowed = tiny_bridge("Gemma2ForCausalLM")
    with torch.no_grad(), stream(windowed, **FULL):
        cache = windowed.run_with_cache(clean())[1]
        with pytest.raises(ValueError, match="window"):
            with_hook(windowed, corrupted(), lambda p: PATCHES["a head"](p, cache["pattern", 0]))


@pytest.mark.hooked
def test_the_head_pattern_patching_of_transformer_lens() -> None:
    from transformer_lens import patching

    model = hooked_model("llama", n_layers=2)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 7].sum()

    with torch.no_grad():
        dense = patching.get_act_patch_attn_head_pattern_all_pos(
            model, corrupted(), model.run_with_cache(clean())[1], metric
        )
        with stream(model, **FULL):
            cache = model.run_with_cache(clean())[1]
            ours = patching.get_act_patch_attn_head_pattern_all_pos(model, corrupted(), cache, metric)
            with pytest.raises(PatternIndexError, match="q_block"):
                patching.get_act_patch_attn_head_pattern_by_pos(model, corrupted(), cache, metric)
            with pytest.raises(PatternIndexError, match="key"):
                patching.get_act_patch_attn_head_pattern_dest_src_pos(model, corrupted(), cache, metric)
    assert ours.shape == (2, 4)
    assert worst((ours, dense)) <= 1e-5


@pytest.mark.hooked
def test_patching_by_position_works_with_query_blocks_of_one() -> None:
    from transformer_lens import patching

    model, length = hooked_model("llama", n_layers=1), 9

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 7].sum()

    a, b = clean()[:, :length], corrupted()[:, :length]
    with torch.no_grad():
        dense = patching.get_act_patch_attn_head_pattern_by_pos(model, b, model.run_with_cache(a)[1], metric)
        with stream(model, q_block=1, k_block=4, k=4):
            cache = model.run_with_cache(a)[1]
            ours = patching.get_act_patch_attn_head_pattern_by_pos(model, b, cache, metric)
    assert worst((ours, dense)) <= 1e-5
    assert f"blocks.0.{PATTERN}" in cache

"""Edits of a SparsePattern change the logits as the same edit of the dense pattern does, in place or given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from stream_lens import BlockMask, SparsePattern, stream
from stream_lens.backend import PatternIndexError
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.runs import PATTERN, SCORES, with_hook, worst
from tests.backend.tiny_models import tiny_bridge

T, Q, K = 61, 16, 8
FULL: dict[str, Any] = {"q_block": Q, "k_block": K, "k": 16}
MODELS = ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", pytest.param("hooked", marks=pytest.mark.hooked)]


@cache
def model_of(name: str) -> Any:
    return hooked_model("llama") if name == "hooked" else tiny_bridge(name)


@cache
def tokens() -> Tensor:
    return tokens_of(2, T)


def zero(*index: Any) -> Callable[[Any], None]:
    def edit(pattern: Any) -> None:
        pattern[index] = 0

    return edit


def hide(*index: Any) -> Callable[[Any], None]:
    def edit(scores: Any) -> None:
        scores[index] = -torch.inf

    return edit


def halve(*index: Any) -> Callable[[Any], None]:
    def edit(pattern: Any) -> None:
        pattern[index] *= 0.5

    return edit


def in_place(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """The change without what it gives back."""

    def edit(pattern: Any) -> None:
        change(pattern)

    return edit


ALL = slice(None)
ROWS, KEYS = slice(16, 48), slice(8, 24)


@dataclass(frozen=True)
class Edit:
    """The same edit on a SparsePattern, and on the dense pattern (or the dense scores, where blocks are dropped)."""

    sparse: Callable[[SparsePattern], Any]
    dense: Callable[[Tensor], Any]
    at: str = PATTERN


EDITS = {
    "head ablation in place": Edit(zero(ALL, 1), zero(ALL, 1)),
    "head ablation from behind": Edit(zero(ALL, -1, ...), zero(ALL, -1, ...)),
    "heads of one batch row": Edit(zero(1, [0, 2]), zero(1, [0, 2])),
    "blocks in place": Edit(zero(ALL, 1, ROWS, KEYS), zero(ALL, 1, ROWS, KEYS)),
    "last ragged rows": Edit(zero(..., slice(48, None), ALL), zero(..., slice(48, None), ALL)),
    "blocks given back": Edit(lambda p: p.scale(0, heads=1, rows=ROWS, keys=KEYS), zero(ALL, 1, ROWS, KEYS)),
    "scaled head given back": Edit(lambda p: p.scale(0.5, heads=[1]), halve(ALL, 1)),
    "scaled head in place": Edit(halve(ALL, 1), halve(ALL, 1)),
    "scaled in place by method": Edit(in_place(lambda p: p.scale_(0.5, batch=0)), halve(0)),
    "all times a number": Edit(lambda p: p * 0.5, lambda p: p * 0.5),
    "all times in place": Edit(in_place(lambda p: p.mul_(0.5)), lambda p: p * 0.5),
    "dropped blocks": Edit(lambda p: p.drop(heads=1, rows=ROWS, keys=KEYS), hide(ALL, 1, ROWS, KEYS), SCORES),
    "dropped in place": Edit(in_place(lambda p: p.drop_(heads=2, keys=KEYS)), hide(ALL, 2, ALL, KEYS), SCORES),
    "kept blocks": Edit(lambda p: p.keep(keys=slice(0, 48)), hide(ALL, ALL, ALL, slice(48, None)), SCORES),
}


FACTORS = [EDITS[name] for name in ("all times a number", "all times in place", "scaled in place by method")]
"""One factor for all heads of a row: Gemma 2 normalises what attention gives, so that it is lost there."""


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
@pytest.mark.parametrize("name", MODELS)
def test_an_edit_changes_the_logits_as_the_dense_edit_does(name: str, edit: Edit) -> None:
    model = model_of(name)
    plain = with_hook(model, tokens(), lambda p: None)
    dense = with_hook(model, tokens(), edit.dense, at=edit.at)
    with stream(model, **FULL):
        ours = with_hook(model, tokens(), edit.sparse)
    assert worst((ours, dense)) <= 2e-5
    if name != "Gemma2ForCausalLM" or edit not in FACTORS:
        assert worst((plain, dense)) > 1e-3


def test_a_row_that_loses_every_block_attends_to_nothing() -> None:
    model = model_of("LlamaForCausalLM")
    dense = with_hook(model, tokens(), zero(ALL, 2, slice(0, 16)))
    with stream(model, **FULL):
        ours = with_hook(model, tokens(), lambda p: p.drop(heads=2, rows=slice(0, 16)))
    assert worst((ours, dense)) <= 2e-5


def test_dropping_a_mask_or_slots() -> None:
    model = model_of("LlamaForCausalLM")
    with stream(model, **FULL):
        expected = with_hook(model, tokens(), lambda p: p.drop(heads=1, rows=ROWS, keys=KEYS))

        def by_mask(pattern: SparsePattern) -> SparsePattern:
            wanted = torch.zeros(pattern.shape, dtype=torch.bool)
            wanted[:, 1, ROWS, KEYS] = True
            return pattern.drop(BlockMask.from_dense(wanted.tril(), Q, K))

        def by_slots(pattern: SparsePattern) -> SparsePattern:
            slots = torch.zeros_like(pattern.mask.indices, dtype=torch.bool)
            slots[:, 1, 1:3] = (pattern.mask.indices[:, 1, 1:3] >= 1) & (pattern.mask.indices[:, 1, 1:3] < 3)
            return pattern.drop(slots)

        assert torch.equal(with_hook(model, tokens(), by_mask), expected)
        assert torch.equal(with_hook(model, tokens(), by_slots), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_tensor_given_back_is_used_as_it_is(name: str) -> None:
    model = model_of(name)
    given = torch.rand(2, 4, T, T)
    dense = with_hook(model, tokens(), lambda p: given.to(p.dtype))
    with stream(model, **FULL):
        ours = with_hook(model, tokens(), lambda p: given.to(p.dtype))
    assert worst((ours, dense)) <= 2e-5


def test_edits_of_delegated_attention_take_effect() -> None:
    """Dense TransformerLens discards them there, so the reference is the same ablation of the head's output."""
    model = model_of("OPTForCausalLM")
    dense = with_hook(model, tokens(), zero(ALL, ALL, 1), at="attn.hook_z")
    with stream(model, **FULL):
        assert worst((with_hook(model, tokens(), zero(ALL, 1)), dense)) <= 2e-5


def test_masses_of_an_edited_pattern_are_known_without_scores() -> None:
    model, seen = model_of("LlamaForCausalLM"), []

    def edit(pattern: SparsePattern) -> SparsePattern:
        edited = pattern.drop(keys=KEYS)
        seen.append(edited.detach())
        return edited

    with stream(model, **FULL, keep_scores=False):
        with_hook(model, tokens(), edit)
    assert not bool(((seen[0].mask.indices >= 1) & (seen[0].mask.indices < 3)).any())
    rows = seen[0].block_mass.sum(-1)
    assert torch.allclose(rows, torch.tensor([16.0, 16.0, 16.0, 13.0]).expand_as(rows))  # one for each row


def test_a_reordered_pattern_given_back_uses_each_rows_own_scores() -> None:
    model = model_of("LlamaForCausalLM")
    order = [2, 0, 3, 1]
    dense = with_hook(model, tokens(), lambda p: p[[1, 0]][:, order])
    with stream(model, **FULL):
        assert worst((with_hook(model, tokens(), lambda p: p[[1, 0]][:, order]), dense)) <= 2e-5


@pytest.mark.parametrize(
    ("index", "value"),
    [
        ((ALL, 1, slice(3, 9)), 0),
        ((ALL, 1, ALL, slice(0, 3)), 0),
        ((ALL, 1, 5, 5), 0),
        ((ALL, 1), 0.3),
        ((ALL, 1), torch.rand(2, T, T)),
    ],
    ids=["rows within a block", "keys within a block", "one entry", "a number", "a dense part"],
)
def test_what_blocks_cannot_express_raises(index: Any, value: Any) -> None:
    def edit(pattern: SparsePattern) -> None:
        pattern[index] = value

    with stream(model_of("LlamaForCausalLM"), **FULL), pytest.raises(PatternIndexError, match=r"block|scale"):
        with_hook(model_of("LlamaForCausalLM"), tokens(), edit)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "given",
    [lambda p: torch.rand(2, 4, T, T - 1), lambda p: p[:, :2], lambda p: p[0], lambda p: p[:, :, 16:], lambda p: "no"],
    ids=["dense of another shape", "half the heads", "one batch row", "some rows", "text"],
)
def test_what_cannot_be_the_pattern_raises(name: str, given: Callable[[Any], Any]) -> None:
    with (
        stream(model_of(name), **FULL),
        pytest.raises((ValueError, TypeError, AttributeError), match=r"hook_pattern|[Tt]ensor|str"),
    ):
        with_hook(model_of(name), tokens(), given)


@pytest.mark.parametrize(
    "edit",
    [zero(ALL, 1), lambda p: p.scale(0.5), lambda p: p.drop(heads=0), lambda p: p[[1, 0]], lambda p: p.to_dense()],
)
def test_edits_while_observing_raise(edit: Callable[[Any], Any]) -> None:
    with stream(model_of("LlamaForCausalLM"), **FULL, observe=True), pytest.raises(RuntimeError, match="observe"):
        with_hook(model_of("LlamaForCausalLM"), tokens(), edit)


@pytest.mark.parametrize("name", [*MODELS, "OPTForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize(
    "edit",
    [
        hide(ALL, 1),
        lambda s: s * 2,
        lambda s: s.mul_(2),
        lambda s: s + 1,
        lambda s: torch.zeros(2, 4, T, T),
        lambda s: s.masked_fill(torch.ones(T, T, dtype=torch.bool), 0.0),
        lambda s: s.tanh(),
        lambda s: s.softmax(-1),
        lambda s: s.detach(),
        lambda s: s[:, :2],
    ],
    ids=["in place", "times", "times in place", "plus", "dense", "filled", "tanh", "softmax", "detached", "cut"],
)
def test_an_edit_of_the_scores_raises(name: str, edit: Callable[[Any], Any]) -> None:
    with stream(model_of(name), **FULL), pytest.raises((RuntimeError, TypeError), match=r"scores|pattern"):
        with_hook(model_of(name), tokens(), edit, at=SCORES)


@pytest.mark.parametrize("name", [*MODELS, "OPTForCausalLM"])
def test_a_backward_hook_on_the_pattern_raises(name: str) -> None:
    model = model_of(name)
    with stream(model, **FULL), pytest.raises(RuntimeError, match="names_filter"):
        model.run_with_hooks(tokens(), bwd_hooks=[(f"blocks.1.{PATTERN}", lambda grad, hook: None)])

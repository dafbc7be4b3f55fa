"""Edits of a SparsePattern change the logits as the same edit of the dense pattern does, in place or given back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
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


def of_a_view(pattern: Any) -> None:
    view = pattern[:, 3]
    view[:] = 0


def of_views_of_views(pattern: Any) -> None:
    pattern[0][2] = 0
    pattern[1].unsqueeze(0)[:, 2][:, 16:48] *= 0.5


def of_views_in_turn(pattern: Any) -> None:
    one, other = pattern[0], pattern[:, 1]
    one[1] = 0
    other.mul_(0.5)
    one[2] *= 0.5


def of_no_rows(pattern: Any) -> None:
    pattern[:, 1, 5:2] = 0
    pattern[:, 2] = 0


def of_copies(pattern: Any) -> None:
    pattern[:, [3]][:] = 0  # indexing by a list copies, in torch too
    pattern.clone()[:, 1] = 0


ALL = slice(None)
MASK = [True, False, True, False]
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
    "heads by a mask": Edit(zero(ALL, MASK), zero(ALL, MASK)),
    "heads by a tensor mask": Edit(zero(ALL, torch.tensor(MASK)), zero(ALL, torch.tensor(MASK))),
    "heads by NumPy's mask": Edit(zero(ALL, np.array(MASK)), zero(ALL, np.array(MASK))),
    "no rows, then a head": Edit(of_no_rows, of_no_rows),
    "a view": Edit(of_a_view, of_a_view),
    "views of views": Edit(of_views_of_views, of_views_of_views),
    "views in turn": Edit(of_views_in_turn, of_views_in_turn),
    "blocks dropped in a view": Edit(
        in_place(lambda p: p[:, 1].drop_(rows=ROWS, keys=KEYS)), hide(ALL, 1, ROWS, KEYS), SCORES
    ),
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
        (([0, 1], [2, 3]), 0),
        ((torch.tensor([0, 1]), ALL, torch.tensor([0, 1])), 0),
        (torch.ones(2, 4, dtype=torch.bool), 0),
        (torch.ones(2, 4, T, T, dtype=torch.bool), 0),
        ((ALL, [True, False]), 0),
        ((ALL, True), 0),
    ],
    ids=[
        "rows within a block",
        "keys within a block",
        "one entry",
        "a number",
        "a dense part",
        "pairs",
        "pairs of tensors",
        "a mask of two axes",
        "a mask of all axes",
        "a mask of another length",
        "True alone",
    ],
)
def test_what_blocks_cannot_express_raises(index: Any, value: Any) -> None:
    def edit(pattern: SparsePattern) -> None:
        pattern[index] = value

    with stream(model_of("LlamaForCausalLM"), **FULL), pytest.raises(PatternIndexError, match=r"block|scale|list"):
        with_hook(model_of("LlamaForCausalLM"), tokens(), edit)


def of_gate(pattern: Any) -> None:
    pattern.gate[:, 1] = 0


def of_gate_of_a_view(pattern: Any) -> None:
    pattern[:, 1].gate.zero_()


def of_detached(pattern: Any) -> None:
    pattern.detach()[:, 1] = 0


def of_a_detached_view(pattern: Any) -> None:
    pattern.detach().float()[0].mul_(0.5)


@pytest.mark.parametrize("edit", [of_gate, of_gate_of_a_view, of_detached, of_a_detached_view])
def test_an_edit_that_the_model_would_not_see_raises(edit: Callable[[Any], None]) -> None:
    model = model_of("LlamaForCausalLM")
    with stream(model, **FULL), pytest.raises(RuntimeError, match=r"would not see|does not see"):
        with_hook(model, tokens(), edit)


def test_copies_are_free_to_change() -> None:
    model, kept = model_of("LlamaForCausalLM"), []
    with stream(model, **FULL):
        plain = with_hook(model, tokens(), lambda p: kept.append(p.detach()))
        assert worst((with_hook(model, tokens(), of_copies), plain)) == 0
    kept[0][:, 1] = 0
    assert not kept[0].to_dense(heads=1).any()
    for copied in (copy.deepcopy(kept[0]), pickle.loads(pickle.dumps(kept[0]))):
        assert torch.equal(copied.to_dense(), kept[0].to_dense())
        copied[:, 2] = 0
        assert kept[0].to_dense(heads=2).any()


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

"""The Triton kernels of block-sparse attention against float64: on a GPU, or in Triton's interpreter without one.

A kernel's error may be 10 × that of eager torch in float32 and 1.1 × in half precision, plus a rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_kernels.block_attention import forward, inverted
from stream_kernels.block_attention.backward import block_attention_backward
from stream_kernels.block_attention.forward import block_attention_forward
from stream_kernels.rule import ScoreRule
from stream_lens.blocks import BlockMask, block_sparse_attention
from tests.ops.attention_cases import (
    Case,
    assert_as_close_as_eager,
    assert_forward_is_the_references,
    eager,
    make_case,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_poisoned_memory")]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EVERYTHING = {"window": 30, "softcap": 2.0, "padding": True, "sinks": True, "gate": True}


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, ScoreRule):
        return replace(value, key_mask=moved(value.key_mask, device), sinks=moved(value.sinks, device))
    return value.to(device) if isinstance(value, Tensor) else value


def run(case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Forward and backward on `device`, results back on the CPU."""
    operands = [moved(x, device) for x in case.operands]
    blocks = {name: moved(x, device) for name, x in case.blocks.items()}
    out, logsumexp, mass = block_attention_forward(*operands, **blocks)
    grads = block_attention_backward(*operands, logsumexp, out, moved(case.grad_out, device), **blocks)
    return tuple(x.cpu() for x in (out, logsumexp, mass)), tuple(None if x is None else x.cpu() for x in grads)


def check(case: Case, device: torch.device) -> None:
    results, grads = run(case, device)
    truth = assert_forward_is_the_references(case, *results)
    ours = {"out": results[0]} | dict(zip(("dq", "dk", "dv", "dgate"), grads, strict=True))
    if case.gate is None:
        assert ours.pop("dgate") is None
    for name, result in ours.items():
        assert result.dtype == (F32 if name == "dgate" else case.q.dtype)
    # A probability of 1 may come out as the number beside it, and its product is rounded again.
    roundings = 2 if case.q.dtype == F32 else 1
    assert_as_close_as_eager(case, ours, truth, roundings=roundings)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_token": {"query_len": 1},
    "ragged_63": {"query_len": 63, "k": 3},
    "heads_share_keys": {"batch": 2, "kv_heads": 2, "groups": 3, "query_len": 20},
    "q_block_of_two_k_blocks": {"q_block": 32, "k_block": 16, "query_len": 50},
    "k_block_of_two_q_blocks": {"q_block": 16, "k_block": 32, "query_len": 50},
    "blocks_of_no_power_of_two": {"q_block": 10, "k_block": 24, "query_len": 50},
    "blocks_cut_into_tiles": {"q_block": 48, "k_block": 72, "query_len": 100},
    "smallest_blocks": {"q_block": 1, "k_block": 2, "query_len": 5},
    "window": {"window": 20},
    "window_of_one_key": {"window": 1, "k": 3},
    "padding": {"batch": 2, "padding": True},
    "softcap": {"softcap": 0.5},
    "sinks": {"groups": 2, "sinks": True},
    "gate": {"gate": True},
    "everything_at_once": {"batch": 2, "groups": 2, "k": 3, **EVERYTHING},
    "decode_one_token": {"query_len": 1, "past": 70, "k": 4},
    "decode_a_few": {"query_len": 17, "past": 37, "k": 3, **EVERYTHING},
    "one_kept_block": {"k": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, triton_device: torch.device) -> None:
    check(make_case(**CASES[name]), triton_device)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("name", ["ragged_63", "blocks_cut_into_tiles", "everything_at_once", "decode_a_few"])
def test_half_precision(name: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    check(make_case(**CASES[name], dtype=dtype), triton_device)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("d_head", [64, 80, 96, 128, 256])
def test_head_dims_in_use(d_head: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    check(make_case(d_head=d_head, query_len=36, gate=True, dtype=dtype), triton_device)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arguments=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "kv_heads": st.integers(1, 2),
            "groups": st.integers(1, 2),
            "query_len": st.integers(1, 40),
            "past": st.sampled_from([0, 0, 1, 37]),
            "d_head": st.sampled_from([2, 5, 16, 20]),
            "q_block": st.integers(6, 40),
            "k_block": st.integers(6, 40),
            "k": st.integers(1, 4),
            "window": st.sampled_from([None, 1, 10, 33]),
            "softcap": st.sampled_from([None, 0.5, 20.0]),
            "padding": st.booleans(),
            "sinks": st.booleans(),
            "gate": st.booleans(),
            "dtype": st.sampled_from([F32, F32, F16, BF16]),
            "seed": st.integers(0, 2**16),
        }
    )
)
def test_random_shapes(arguments: dict[str, Any], triton_device: torch.device) -> None:
    check(make_case(**arguments), triton_device)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys_give_zero_and_no_gradient(sinks: bool, triton_device: torch.device) -> None:
    case = make_case(sinks=sinks, gate=True)
    case = replace(case, indices=torch.full_like(case.indices, -1))
    (out, logsumexp, mass), grads = run(case, triton_device)
    assert all((x == 0).all() for x in (out, mass, *grads))
    expected = torch.full_like(logsumexp, -torch.inf) if case.rule.sinks is None else case.rule.sinks[0]
    torch.testing.assert_close(logsumexp, torch.as_tensor(expected).expand_as(logsumexp))


def test_everything_kept_is_dense_attention(triton_device: torch.device) -> None:
    case = make_case(groups=2, query_len=50, past=13)
    every_block = torch.arange(4, dtype=torch.int32).expand(1, 2, 4, 4)
    (out, _, mass), _ = run(replace(case, indices=every_block), triton_device)
    seen = torch.ones(50, 63, dtype=torch.bool).tril(13)
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q, case.k.expand(1, 2, 63, 16), case.v.expand(1, 2, 63, 16), attn_mask=seen
    )
    torch.testing.assert_close(out, dense)
    rows = torch.tensor([16.0, 16.0, 16.0, 2.0]).expand(1, 2, 4)
    torch.testing.assert_close(mass.sum(-1), rows)


def test_order_of_slots_and_empty_slots_do_not_matter(triton_device: torch.device) -> None:
    case = make_case(k=3)
    (out, _, mass), _ = run(case, triton_device)
    flipped = torch.nn.functional.pad(case.indices.flip(-1), (2, 1), value=-1)
    (same_out, _, same_mass), _ = run(replace(case, indices=flipped), triton_device)
    torch.testing.assert_close(same_out, out)
    torch.testing.assert_close(same_mass[..., 2:-1].flip(-1), mass)


def test_scores_too_large_for_exp_without_a_maximum(triton_device: torch.device) -> None:
    case = make_case(k=3)
    check(replace(case, q=case.q * 30, k=case.k * 30), triton_device)


def test_few_programs_walk_many_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(forward, "MIN_PROGRAMS", 2)
    check(make_case(groups=2, query_len=70, k=3), triton_device)


def test_a_block_kept_very_often_is_cut_into_pieces(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inverted, "MOST_ENTRIES", 2)
    case = make_case(kv_heads=2, groups=2, query_len=70, k=3, gate=True)
    indices = case.indices.clone()
    indices[..., 0], indices[..., 1:] = 0, indices[..., 1:].masked_fill(indices[..., 1:] == 0, -1)
    check(replace(case, indices=indices), triton_device)


def test_equal_inputs_give_equal_bits(triton_device: torch.device) -> None:
    case = make_case(groups=2, query_len=50, gate=True)
    first, second = run(case, triton_device), run(case, triton_device)
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_block_sparse_attention_runs_them_when_asked(gated: bool, triton_device: torch.device) -> None:
    case = make_case(groups=2, sinks=True, gate=gated)
    mask = BlockMask(case.indices.sort(descending=True).values.to(triton_device), 16, 16, 40, 40, 0, None)
    results = []
    for kernel in ("triton", "torch"):
        leaves = [moved(x, triton_device).clone().requires_grad_() for x in (case.q, case.k, case.v, case.rule.sinks)]
        gate = None if case.gate is None else moved(case.gate, triton_device).clone().requires_grad_()
        rule = replace(case.rule, sinks=leaves[3])
        result = block_sparse_attention(*leaves[:3], mask, rule, gate, kernel=kernel)
        wanted = leaves if gate is None else [*leaves, gate]
        grads = torch.autograd.grad(result.out, wanted, moved(case.grad_out, triton_device))
        results.append([*result, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_this_test_can_fail(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, gate=True)
    truth = eager(case, torch.float64)
    assert_as_close_as_eager(case, eager(case, dtype), truth)
    for name, exact in truth.items():
        with pytest.raises(AssertionError, match=name):
            assert_as_close_as_eager(case, {name: exact + 100 * torch.finfo(dtype).eps * exact.abs().max()}, truth)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: {"k": c.k.bfloat16()}, TypeError, "bfloat16"),
        (lambda c: {"q": c.q.double(), "k": c.k.double(), "v": c.v.double()}, RuntimeError, "float64"),
        (lambda c: {"k": c.k[:, :, :-1]}, ValueError, "must have one shape"),
        (lambda c: {"indices": c.indices[:, :, :-1]}, ValueError, "indices"),
        (lambda c: {"indices": c.indices[..., :0]}, ValueError, "at least one slot"),
        (lambda c: {"gate": torch.ones(1)}, ValueError, "gate"),
        (lambda c: {"rule": replace(c.rule, sinks=torch.ones(3))}, ValueError, "sinks"),
        (lambda c: {"rule": replace(c.rule, key_mask=torch.ones(1, 3) > 0)}, ValueError, "key_mask"),
        (lambda c: {"q": c.q.to("meta"), "k": c.k.to("meta"), "v": c.v.to("meta")}, ValueError, "meta"),
        (lambda c: {"q_block": 0}, ValueError, "q_block"),
    ],
)
def test_wrong_arguments_raise(change: Any, error: type[Exception], message: str) -> None:
    case = make_case()
    case = replace(case, **change(case))
    with pytest.raises(error, match=message):
        block_attention_forward(*case.operands, **case.blocks)

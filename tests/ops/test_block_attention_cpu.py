"""The C++ operator against the float64 reference: error no worse than eager torch's own in the same precision."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_kernels.cpu import build, cpu_available, cpu_block_attention_backward, cpu_block_attention_forward
from tests.ops.attention_cases import (
    Case,
    assert_as_close_as_eager,
    assert_forward_is_the_references,
    make_case,
)

needs_operator = pytest.mark.skipif(not cpu_available()[0], reason=cpu_available()[1])


@pytest.fixture(autouse=True)
def _nan_poisoned_memory() -> Iterator[None]:
    """``torch.empty`` yields NaN, in the operator as well: what it does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case_of(*, strided: bool = False, **choices: Any) -> Case:
    """A problem with grouped heads; its tensors lie in strided memory between NaN, or are contiguous."""
    case = make_case(**{"groups": 2, "query_len": 50, "k": 3, **choices})
    if strided:
        return case
    return replace(case, **{name: getattr(case, name).contiguous() for name in ("q", "k", "v", "grad_out")})


def check(case: Case) -> None:
    """Forward against the reference, backward against float64 autograd."""
    out, logsumexp, mass = cpu_block_attention_forward(case.q, case.k, case.v, case.indices, case.rule, **case.blocks)
    truth = assert_forward_is_the_references(case, out, logsumexp, mass)
    grads = cpu_block_attention_backward(
        case.q, case.k, case.v, case.indices, case.rule, logsumexp, out, case.grad_out, **case.blocks
    )
    assert [x.dtype for x in grads] == [*[case.q.dtype] * 3, torch.float32]
    # Scores, weights and sums of blocks are each rounded to float32 on the way.
    roundings = 4 if case.q.dtype == torch.float32 else 1
    assert_as_close_as_eager(case, dict(zip(truth, (out, *grads), strict=True)), truth, roundings=roundings)


@needs_operator
@settings(max_examples=120, deadline=None)
@given(
    arguments=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "kv_heads": st.integers(1, 2),
            "groups": st.integers(1, 3),
            "query_len": st.integers(1, 70),
            "past": st.sampled_from([0, 0, 1, 37, 64]),
            "d_head": st.sampled_from([2, 5, 16, 20, 64, 80]),
            "q_block": st.integers(1, 40),
            "k_block": st.integers(1, 40),
            "k": st.integers(1, 6),
            "window": st.sampled_from([None, 1, 10, 33]),
            "softcap": st.sampled_from([None, 0.5, 20.0]),
            "padding": st.booleans(),
            "sinks": st.booleans(),
            "gate": st.booleans(),
            "strided": st.booleans(),
            "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
            "seed": st.integers(0, 2**16),
        }
    )
)
def test_random_shapes(arguments: dict) -> None:
    check(case_of(**arguments))


@needs_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_head", "block"), [(64, 32), (96, 16), (128, 64), (256, 32)])
def test_head_dims_in_use(d_head: int, block: int, dtype: torch.dtype) -> None:
    check(case_of(query_len=150, d_head=d_head, q_block=block, k_block=block, dtype=dtype))


@needs_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_blocks_than_one_chunk_of_scores(dtype: torch.dtype) -> None:
    """Chunks meet through a running maximum: scores that grow along the keys make every chunk raise it."""
    case = case_of(
        query_len=150, past=900, d_head=32, q_block=128, k_block=64, k=17, gate=True, sinks=True, dtype=dtype
    )
    louder = case.k * torch.linspace(0.1, 4, 1050)[:, None].to(dtype)
    ascending = torch.arange(17, dtype=torch.int32).expand(case.indices.shape)
    check(replace(case, k=louder, indices=ascending))
    check(replace(case, k=louder, indices=ascending.flip(-1)))


@needs_operator
def test_scores_too_large_for_exp_without_a_maximum() -> None:
    case = case_of(query_len=40)
    check(replace(case, q=case.q * 30, k=case.k * 30))


@needs_operator
def test_rows_without_keys_give_zero_and_no_gradient() -> None:
    case = case_of(query_len=20, k=2)
    case = replace(case, indices=torch.full_like(case.indices, -1))
    out, logsumexp, mass = cpu_block_attention_forward(case.q, case.k, case.v, case.indices, case.rule, **case.blocks)
    assert (out == 0).all()
    assert (logsumexp == -torch.inf).all()
    assert (mass == 0).all()
    grads = cpu_block_attention_backward(
        case.q, case.k, case.v, case.indices, case.rule, logsumexp, out, case.grad_out, **case.blocks
    )
    assert all((x == 0).all() for x in grads)


@needs_operator
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_count_changes_no_forward_bit(threads: int) -> None:
    case = case_of(batch=2, query_len=70, gate=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(case)
        ours = cpu_block_attention_forward(case.q, case.k, case.v, case.indices, case.rule, **case.blocks)
        torch.set_num_threads(1)
        alone = cpu_block_attention_forward(case.q, case.k, case.v, case.indices, case.rule, **case.blocks)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@needs_operator
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, from switching oneDNN off and on
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_brgemm_the_plain_loop_serves(dtype: torch.dtype) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        check(case_of(query_len=70, d_head=20, k_block=24, gate=True, dtype=dtype))


@needs_operator
def test_compiles_as_one_graph() -> None:
    case = case_of(gate=True)

    def call(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        out, logsumexp, mass = cpu_block_attention_forward(q, k, v, indices, case.rule, **case.blocks)
        grads = cpu_block_attention_backward(q, k, v, indices, case.rule, logsumexp, out, case.grad_out, **case.blocks)
        return out * 2, logsumexp, mass, *grads

    operands = case.q, case.k, case.v, case.indices
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*operands)
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(*operands), strict=True))


@needs_operator
def test_schema_and_fake_kernels_tell_the_truth() -> None:
    case = case_of(strided=True)
    rule = case.rule
    operands = (case.q, case.k, case.v, case.indices, 16, 16, rule.scale, 0, None, None, None, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.stream_lens_cpu.block_attention_forward.default, operands, test_utils=checks)
    out, logsumexp, _ = torch.ops.stream_lens_cpu.block_attention_forward(*operands)
    operands = (*operands, logsumexp, out, case.grad_out)
    torch.library.opcheck(torch.ops.stream_lens_cpu.block_attention_backward.default, operands, test_utils=checks)


@needs_operator
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: {"q": c.q.half(), "k": c.k.half(), "v": c.v.half()}, TypeError, "float16"),
        (lambda c: {"k": c.k.bfloat16()}, TypeError, "bfloat16"),
        (lambda c: {"k": c.k[:, :, :-1]}, ValueError, "do not fit"),
        (lambda c: {"indices": c.indices[:, :, :-1]}, ValueError, "indices"),
        (lambda c: {"indices": torch.full_like(c.indices, 4)}, ValueError, "key block 4"),
        (lambda c: {"gate": torch.ones(1)}, ValueError, "gate"),
        (lambda c: {"rule": replace(c.rule, sinks=torch.ones(3))}, ValueError, "sinks"),
        (lambda c: {"q": c.q.to("meta")}, ValueError, "meta"),
        (lambda c: {"q_block": 0}, ValueError, "q_block"),
    ],
)
def test_wrong_arguments_raise(change, error: type[Exception], message: str) -> None:
    case = case_of()
    case = replace(case, **change(case))
    with pytest.raises(error, match=message):
        cpu_block_attention_forward(case.q, case.k, case.v, case.indices, case.rule, **case.blocks)


REPORT = "from stream_kernels.cpu import cpu_available; print(*cpu_available())"


def report(cache: Path, **environment: str) -> subprocess.Popen:
    """A fresh process that prints cpu_available()."""
    paths = {"STREAM_LENS_CACHE": str(cache), "PYTHONPATH": str(build.SOURCE_FOLDER.parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", REPORT],
        env={**os.environ, **paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_compiler_is_a_reason_not_an_error(tmp_path: Path) -> None:
    process = report(tmp_path, PATH=str(tmp_path), CXX="")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.startswith("False no C++ compiler on the PATH")


def test_compiling_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_LENS_NO_COMPILE", "1")
    with pytest.raises(build.BuildError, match="STREAM_LENS_NO_COMPILE"):
        build.build()


@pytest.mark.parametrize(("command", "message"), [("false", "failed"), ("no-such-compiler", "not found")])
def test_a_failed_build_leaves_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.setenv("STREAM_LENS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", command)
    with pytest.raises(build.BuildError, match=message):
        build.build()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_an_unwritable_cache_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STREAM_LENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="STREAM_LENS_CACHE"):
        build.build()


@pytest.mark.slow
@needs_operator
def test_two_processes_build_once(tmp_path: Path) -> None:
    processes = [report(tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in processes]
    assert all(out.startswith("True") for out, _ in results)
    assert sum("building the CPU operator" in err for _, err in results) == 1
    assert len(list(tmp_path.rglob("*.so"))) == 1
    assert not list(tmp_path.rglob("building-*"))

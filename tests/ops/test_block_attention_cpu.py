"""The C++ operator against the float64 reference: error no worse than eager torch's own in the same precision."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_kernels.block_attention.reference import block_attention_reference, visible_reference
from stream_kernels.cpu import build, cpu_available, cpu_block_attention_backward, cpu_block_attention_forward
from stream_kernels.rule import ScoreRule

needs_operator = pytest.mark.skipif(not cpu_available()[0], reason=cpu_available()[1])


@dataclass(frozen=True)
class Case:
    """One call of the operator, and what its gradients start from."""

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    rule: ScoreRule
    q_block: int
    k_block: int
    gate: Tensor | None
    grad_out: Tensor

    @property
    def blocks(self) -> dict:
        return {"q_block": self.q_block, "k_block": self.k_block, "gate": self.gate}


@pytest.fixture(autouse=True)
def _nan_poisoned_memory() -> Iterator[None]:
    """``torch.empty`` yields NaN, in the operator as well: what it does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(
    *,
    batch: int = 1,
    kv_heads: int = 1,
    groups: int = 2,
    query_len: int = 50,
    past: int = 0,
    d_head: int = 16,
    q_block: int = 16,
    k_block: int = 16,
    k: int = 3,
    window: int | None = None,
    softcap: float | None = None,
    padding: bool = False,
    sinks: bool = False,
    gate: bool = False,
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random tensors and random kept blocks, with empty slots anywhere; ``strided``: [batch, row, head, d] memory."""
    random = torch.Generator().manual_seed(seed)
    heads, key_len = kv_heads * groups, past + query_len

    def rows(head: int, length: int) -> Tensor:
        if strided:
            return torch.randn(batch, length, head, d_head, generator=random).to(dtype).transpose(1, 2)
        return torch.randn(batch, head, length, d_head, generator=random).to(dtype)

    q_blocks, k_blocks = -(-query_len // q_block), -(-key_len // k_block)
    drawn = torch.rand(batch, heads, q_blocks, k_blocks + k, generator=random).argsort(-1)[..., :k]
    indices = torch.where(drawn < k_blocks, drawn, -1).int()
    rule = ScoreRule(
        d_head**-0.5,
        offset=past,
        window=window,
        softcap=softcap,
        key_mask=torch.rand(batch, key_len, generator=random) > 0.3 if padding else None,
        sinks=torch.randn(heads, generator=random) if sinks else None,
    )
    gates = 2 * torch.rand(indices.shape, generator=random) - 0.5 if gate else None
    q, key, v, grad_out = (
        rows(heads, query_len),
        rows(kv_heads, key_len),
        rows(kv_heads, key_len),
        rows(heads, query_len),
    )
    return Case(q, key, v, indices, rule, q_block, k_block, gates, grad_out)


def dense_pattern(case: Case, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Dense probabilities [batch, head, query, key] under the block mask, and kept blocks one-hot [.., k, k_blocks]."""
    rule, groups = case.rule, q.shape[1] // k.shape[1]
    scores = rule.scale * (q @ k.repeat_interleave(groups, 1).transpose(-1, -2))
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    k_blocks = -(-k.shape[2] // case.k_block)
    kept = torch.nn.functional.one_hot(case.indices.long() + 1, k_blocks + 1)[..., 1:].to(q.dtype)
    visible = visible_reference(rule, q.shape[0], q.shape[2], k.shape[2])[:, None] & (of_pairs(case, kept.sum(-2)) > 0)
    sinks = torch.full((q.shape[1],), -1e30) if rule.sinks is None else rule.sinks
    sink_column = sinks.to(q.dtype)[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    with_sink = torch.cat([scores.masked_fill(~visible, -1e30), sink_column], -1)
    return with_sink.softmax(-1)[..., :-1] * visible, kept


def of_pairs(case: Case, blocks: Tensor) -> Tensor:
    """[batch, head, q_blocks, k_blocks] to [batch, head, query, key]."""
    rows = blocks.repeat_interleave(case.q_block, 2)[:, :, : case.q.shape[2]]
    return rows.repeat_interleave(case.k_block, 3)[..., : case.k.shape[2]]


def eager(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Dense attention under the block mask, and its gradients by autograd, in ``dtype``."""
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in (case.q, case.k, case.v))
    gate = (torch.ones(case.indices.shape) if case.gate is None else case.gate).to(dtype, copy=True).requires_grad_()
    pattern, kept = dense_pattern(case, q, k)
    gated = pattern * of_pairs(case, torch.einsum("bhqk,bhqkn->bhqn", gate, kept))
    out = gated @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    dq, dk, dv, dgate = torch.autograd.grad(out, (q, k, v, gate), case.grad_out.to(dtype))
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv, "dgate": dgate}


def sizes_before_cancelling(case: Case) -> dict[str, float]:
    """The largest sum of absolute terms behind each result: rounding shows against these, not against a difference.

    Where one key takes all, for example, dq is a difference of equal numbers, and 0.
    """
    q, k, v, grad = (x.double().abs() for x in (case.q, case.k, case.v, case.grad_out))
    batch, kv_heads, key_len, d_head = k.shape
    groups = q.shape[1] // kv_heads
    pattern, kept = dense_pattern(case, case.q.double(), case.k.double())
    gate = torch.ones(case.indices.shape).double() if case.gate is None else case.gate.double().abs()
    gated = pattern * of_pairs(case, torch.einsum("bhqk,bhqkn->bhqn", gate, kept))
    grad_pattern = grad @ v.repeat_interleave(groups, 1).transpose(-1, -2)
    grad_scores = gated * grad_pattern + pattern * (gated * grad_pattern).sum(-1, keepdim=True)
    grad_scores = case.rule.scale * grad_scores

    def of_keys(x: Tensor) -> Tensor:
        return x.view(batch, kv_heads, groups, key_len, d_head).sum(2)

    results = {
        "out": gated @ v.repeat_interleave(groups, 1),
        "dq": grad_scores @ k.repeat_interleave(groups, 1),
        "dk": of_keys(grad_scores.transpose(-1, -2) @ q),
        "dv": of_keys(gated.transpose(-1, -2) @ grad),
        "dgate": (pattern * grad_pattern).sum((-1, -2)),
    }
    return {name: float(x.max()) for name, x in results.items()}


def assert_as_close_as_eager(case: Case, ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """10 × eager's error in float32, 1.1 × in bfloat16, plus two roundings of the terms (weights, then out)."""
    low, sizes = eager(case, case.q.dtype), sizes_before_cancelling(case)
    fudge, step = (10, 2e-7) if case.q.dtype == torch.float32 else (1.1, 2**-8)
    for name, exact in truth.items():
        assert ours[name].isfinite().all(), f"{name}: not finite, or never written"
        error, allowed = (ours[name].double() - exact).abs().max(), (low[name].double() - exact).abs().max()
        bound = fudge * allowed + step * sizes[name]
        assert error <= bound, f"{name}: error {error}, eager's {allowed}, allowed {bound}"


def check(case: Case) -> None:
    """Forward against the reference, backward against float64 autograd."""
    dtype = case.q.dtype
    out, logsumexp, mass = cpu_block_attention_forward(case.q, case.k, case.v, case.indices, case.rule, **case.blocks)
    true_out, true_logsumexp, true_mass = block_attention_reference(
        case.q, case.k, case.v, case.indices, case.rule, **case.blocks
    )
    assert out.dtype == dtype
    assert logsumexp.dtype == mass.dtype == torch.float32
    assert not logsumexp.isnan().any()
    torch.testing.assert_close(logsumexp.double(), true_logsumexp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass.double(), true_mass, rtol=1e-5, atol=1e-5)
    assert (mass[case.indices < 0] == 0).all()
    assert (out[logsumexp == -torch.inf] == 0).all()

    grads = cpu_block_attention_backward(
        case.q, case.k, case.v, case.indices, case.rule, logsumexp, out, case.grad_out, **case.blocks
    )
    assert [x.dtype for x in grads] == [dtype, dtype, dtype, torch.float32]
    truth = eager(case, torch.float64)
    torch.testing.assert_close(truth["out"], true_out)
    assert_as_close_as_eager(case, dict(zip(truth, (out, *grads), strict=True)), truth)


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
    check(make_case(**arguments))


@needs_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_head", "block"), [(64, 32), (96, 16), (128, 64), (256, 32)])
def test_head_dims_in_use(d_head: int, block: int, dtype: torch.dtype) -> None:
    check(make_case(query_len=150, d_head=d_head, q_block=block, k_block=block, dtype=dtype))


@needs_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_blocks_than_one_chunk_of_scores(dtype: torch.dtype) -> None:
    """Chunks meet through a running maximum: scores that grow along the keys make every chunk raise it."""
    case = make_case(
        query_len=150, past=900, d_head=32, q_block=128, k_block=64, k=17, gate=True, sinks=True, dtype=dtype
    )
    louder = case.k * torch.linspace(0.1, 4, 1050)[:, None].to(dtype)
    ascending = torch.arange(17, dtype=torch.int32).expand(case.indices.shape)
    check(replace(case, k=louder, indices=ascending))
    check(replace(case, k=louder, indices=ascending.flip(-1)))


@needs_operator
def test_scores_too_large_for_exp_without_a_maximum() -> None:
    case = make_case(query_len=40)
    check(replace(case, q=case.q * 30, k=case.k * 30))


@needs_operator
def test_rows_without_keys_give_zero_and_no_gradient() -> None:
    case = make_case(query_len=20, k=2)
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
    case = make_case(batch=2, query_len=70, gate=True)
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
        check(make_case(query_len=70, d_head=20, k_block=24, gate=True, dtype=dtype))


@needs_operator
def test_compiles_as_one_graph() -> None:
    case = make_case(gate=True)

    def call(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        out, logsumexp, mass = cpu_block_attention_forward(q, k, v, indices, case.rule, **case.blocks)
        grads = cpu_block_attention_backward(q, k, v, indices, case.rule, logsumexp, out, case.grad_out, **case.blocks)
        return out * 2, logsumexp, mass, *grads

    operands = case.q, case.k, case.v, case.indices
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*operands)
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(*operands), strict=True))


@needs_operator
def test_schema_and_fake_kernels_tell_the_truth() -> None:
    case = make_case(strided=True)
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
    case = make_case()
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

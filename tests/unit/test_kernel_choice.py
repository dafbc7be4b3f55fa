"""Which path is chosen, what is said where one cannot run, and that the paths agree, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_kernels.cpu import cpu_available, library
from stream_kernels.rule import ScoreRule
from stream_lens.blocks import StreamConfig, block_sparse_attention, select_blocks
from stream_lens.blocks.kernel_choice import choose_kernel, why_not

needs_operator = pytest.mark.skipif(not cpu_available()[0], reason=cpu_available()[1])


def inputs(
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    length: int = 70,
    d_head: int = 8,
    sinks: bool = True,
    padding: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """q, k, v, a searched mask, a rule and a gate, all leaves that want gradients."""
    random = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = (leaf(2, h, length, d_head) for h in (heads, kv_heads, kv_heads))
    key_mask = torch.ones(2, length, dtype=torch.bool)
    key_mask[0, :5] = False
    rule = ScoreRule(
        d_head**-0.5,
        window=window,
        softcap=softcap,
        key_mask=key_mask if padding else None,
        sinks=leaf(heads) if sinks else None,
    )
    mask = select_blocks(q.detach(), k.detach(), StreamConfig(q_block=8, k_block=8, k=3), rule)
    gate = leaf(*mask.indices.shape)
    return {"q": q, "k": k, "v": v, "mask": mask, "rule": rule, "gate": gate}


def results(kernel: str, call: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs of one path and the gradients of a random projection of `out`."""
    got = block_sparse_attention(**call, kernel=kernel)  # type: ignore[arg-type]
    weight = torch.randn(got.out.shape, generator=torch.Generator().manual_seed(1)).to(got.out.dtype)
    leaves = {name: call[name] for name in ("q", "k", "v", "gate")}
    if call["rule"].sinks is not None:
        leaves["sinks"] = call["rule"].sinks
    grads = torch.autograd.grad((got.out * weight).sum(), list(leaves.values()))
    return {**got._asdict(), **dict(zip([f"d{name}" for name in leaves], grads, strict=True))}


@needs_operator
@settings(max_examples=30)
@given(
    sinks=st.booleans(),
    padding=st.booleans(),
    window=st.sampled_from([None, 13]),
    softcap=st.sampled_from([None, 5.0]),
    length=st.integers(1, 90),
    seed=st.integers(0, 1000),
)
def test_cpp_and_torch_agree_in_outputs_and_gradients(**case: Any) -> None:
    call = inputs(torch.float32, **case)
    cpp, plain = results("cpp", call), results("torch", call)
    assert cpp.keys() == plain.keys()
    for name, value in plain.items():
        assert cpp[name].dtype == value.dtype, name
        torch.testing.assert_close(cpp[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("options", [{}, {"window": 20, "softcap": 3.0}, {"sinks": False, "padding": True}])
def test_torch_gradients_against_finite_differences(options: dict[str, Any]) -> None:
    call = inputs(torch.float64, length=21, d_head=3, **options)
    rule, sinks = call["rule"], call["rule"].sinks

    def out(*leaves: Tensor) -> Tensor:
        q, k, v, gate, *rest = leaves
        replaced = ScoreRule(rule.scale, rule.offset, rule.window, rule.softcap, rule.key_mask, *rest)
        return block_sparse_attention(q, k, v, call["mask"], replaced, gate).out

    leaves = [call[name] for name in ("q", "k", "v", "gate")] + ([] if sinks is None else [sinks])
    assert torch.autograd.gradcheck(out, leaves, fast_mode=True)


@needs_operator
@pytest.mark.parametrize(
    ("dtype", "path"),
    [(torch.float32, "cpp"), (torch.bfloat16, "cpp"), (torch.float16, "torch"), (torch.float64, "torch")],
)
def test_auto_on_cpu_takes_the_operator_where_it_computes_that_dtype(dtype: torch.dtype, path: str) -> None:
    assert choose_kernel("auto", torch.zeros(1, 1, 1, 8, dtype=dtype)).name == path


def test_auto_falls_back_to_torch_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_state", (False, "no C++ compiler on the PATH"))
    q = torch.zeros(1, 1, 1, 8)
    assert choose_kernel("auto", q).name == "torch"
    with pytest.raises(RuntimeError, match=r"kernel='cpp' cannot run here: no C\+\+ compiler.*kernel='torch'"):
        choose_kernel("cpp", q)


def test_a_device_without_kernels_runs_torch() -> None:
    q = torch.zeros(1, 1, 1, 8, device="meta")
    assert choose_kernel("auto", q).name == "torch"
    with pytest.raises(RuntimeError, match=r"kernel='cpp' cannot run here: .*not 'meta'"):
        choose_kernel("cpp", q)
    with pytest.raises(RuntimeError, match="kernel='triton' cannot run here"):
        choose_kernel("triton", q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_on_a_gpu_wants_triton(dtype: torch.dtype) -> None:
    assert why_not("triton", torch.device("cuda"), dtype, 64) is None
    assert "float64" in (why_not("triton", torch.device("cuda"), torch.float64, 64) or "")


def test_forced_cpp_refuses_other_dtypes() -> None:
    call = inputs(torch.float16)
    with pytest.raises(RuntimeError, match=r"float32 and bfloat16, not torch\.float16"):
        block_sparse_attention(**call, kernel="cpp")


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="kernel='cuda' is not known: choose one of auto, triton, cpp, torch"):
        block_sparse_attention(**inputs(), kernel="cuda")  # type: ignore[arg-type]

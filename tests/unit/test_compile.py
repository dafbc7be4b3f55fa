"""torch.compile takes the search and the attention as one graph, gradients included, with the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stream_kernels.cpu import cpu_available
from stream_kernels.rule import ScoreRule
from stream_lens.blocks import FractionOfPrefix, MassThreshold, StreamConfig, block_sparse_attention, select_blocks

needs_operator = pytest.mark.skipif(not cpu_available()[0], reason=cpu_available()[1])
KERNELS = [pytest.param("cpp", marks=needs_operator), "torch"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(length: int = 130, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, length, 8, generator=random) for heads in (4, 2, 2))  # type: ignore[return-value]


def check(kernel: str, config: StreamConfig, rule: ScoreRule | None, backend: str) -> None:
    q, k, v = operands()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        mask = select_blocks(q, k, config, rule, kernel=kernel)  # type: ignore[call-overload]
        result = block_sparse_attention(q, k, v, mask, rule, kernel=kernel)  # type: ignore[arg-type]
        return mask.indices, result.out * 2, result.logsumexp, result.block_mass

    indices, out, *rest = run(q, k, v)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    indices_compiled, out_compiled, *rest_compiled = compiled(q, k, v)
    used = indices.shape[-1]  # compiled code cannot drop slots that the data left empty
    assert torch.equal(indices_compiled[..., :used], indices)
    assert (indices_compiled[..., used:] == -1).all()
    torch.testing.assert_close(out_compiled, out)
    torch.testing.assert_close(rest_compiled[0], rest[0])
    torch.testing.assert_close(rest_compiled[1][..., :used], rest[1])
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    expected = torch.autograd.grad((out * weight).sum(), leaves)
    found = torch.autograd.grad((out_compiled * weight).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", [4, FractionOfPrefix(0.3), MassThreshold(0.8, 6)], ids=str)
def test_one_graph_for_every_schedule(kernel: str, k: Any) -> None:
    check(kernel, StreamConfig(q_block=16, k_block=16, k=k, oversample=2), None, "aot_eager")


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_graph_under_windows_padding_and_soft_caps(kernel: str) -> None:
    key_mask = torch.ones(2, 130, dtype=torch.bool)
    key_mask[0, :20] = False
    rule = ScoreRule(0.5, window=70, softcap=5.0, key_mask=key_mask)
    config = StreamConfig(q_block=16, k_block=16, k=4, representative="centre", reduce="max", oversample=1)
    check(kernel, config, rule, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_inductor(kernel: str) -> None:
    check(kernel, StreamConfig(q_block=16, k_block=16, k=4), None, "inductor")

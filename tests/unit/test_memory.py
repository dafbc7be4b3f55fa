"""No step makes a tensor of T² elements, whatever the selector: the largest that torch hands out is watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import (
    BlockMask,
    FractionOfPrefix,
    MassThreshold,
    StreamConfig,
    block_sparse_attention,
    select_blocks,
)
from stream_lens.blocks.dense import dense_attention
from stream_lens.blocks.search import CHUNK_BYTES

T = 8192


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation below it returned, views by the memory behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return out


def largest(run: Callable[[], Any]) -> int:
    with LargestTensor() as watch:
        run()
    return watch.nbytes


def operands(length: int = T) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, length, 16, generator=random), torch.randn(1, 1, length, 16, generator=random)


CONFIGS = {
    "stream": StreamConfig(),
    "stream, strided keys": StreamConfig(representative="strided", reduce="max", query_stride=1),
    "stream, mean and variance": StreamConfig(representative="mean_var", rank="mass"),
    "stream, fraction": StreamConfig(k=FractionOfPrefix(0.1)),
    "stream, mass": StreamConfig(k=MassThreshold(0.9)),
    "window_sinks": StreamConfig(selector="window_sinks"),
    "random": StreamConfig(selector="random"),
    "exhaustive": StreamConfig(selector="exhaustive"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_selection_stays_within_a_few_chunks(name: str) -> None:
    q, k = operands()
    assert largest(lambda: select_blocks(q, k, CONFIGS[name])) <= 2 * CHUNK_BYTES < T * T


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_attention_and_its_gradients_stay_within_a_few_chunks(kernel: Any) -> None:
    q, k = operands()
    mask = select_blocks(q, k, StreamConfig(selector="window_sinks"))
    q, k, v = (x.clone().requires_grad_() for x in (q, k, k))
    gate = torch.ones(mask.indices.shape, requires_grad=True)

    def both_passes() -> None:
        block_sparse_attention(q, k, v, mask, gate=gate, kernel=kernel).out.sum().backward()

    assert largest(both_passes) <= 2 * CHUNK_BYTES


def test_dense_attention_stays_within_its_chunks() -> None:
    q, k = operands(4096)
    mask = select_blocks(q, k, StreamConfig(selector="window_sinks"))
    q.requires_grad_()

    def both_passes() -> None:
        dense_attention(q, k, k, ScoreRule(0.25), mask).out.sum().backward()

    assert largest(both_passes) <= 4 * CHUNK_BYTES < 4 * 4096 * 4096


def test_twice_the_text_takes_twice_the_mask() -> None:
    sizes = []
    for length in (T // 2, T):
        q, k = operands(length)
        sizes.append(select_blocks(q, k, StreamConfig(selector="window_sinks")).nbytes)
    assert sizes[1] == 2 * sizes[0]


def test_masks_combine_and_cut_within_the_size_of_their_indices() -> None:
    q, k = operands()
    a, b = (select_blocks(q, k, StreamConfig(selector="random", seed=seed)) for seed in (0, 1))

    def use() -> None:
        _ = a & b, a | b, a - b, a ^ b
        a.equal(b)
        a.check()
        a.sparsity()
        a.to_dense(rows=slice(0, 4))

    assert largest(use) <= 16 * a.nbytes < T * T


def test_the_watch_sees_a_dense_mask() -> None:
    mask = BlockMask(torch.zeros(1, 1, 64, 1, dtype=torch.int32), 32, 32, 2048, 2048)
    assert largest(mask.to_dense) >= 2048 * 2048

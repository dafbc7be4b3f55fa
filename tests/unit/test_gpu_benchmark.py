"""The GPU benchmark's own logic, on CPU tensors with another clock; and what it says without a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.functional import scaled_dot_product_attention

from tests.benchmarks import gpu


def one_second_each(programs: Mapping[str, gpu.Program]) -> dict[str, list[float]]:
    for program in programs.values():
        program()
    return {name: [1.0, 2.0, 3.0] for name in programs} | {"dense": [8.0]}


def masked_dense(q: Tensor, k: Tensor, v: Tensor, *, block_mask: FlexBlockMask, enable_gqa: bool) -> Tensor:
    """Uncompiled flex_attention is dense and ignores the blocks: this one does not."""
    rows, columns = block_mask.BLOCK_SIZE
    kept = block_mask.to_dense().bool().repeat_interleave(rows, 2).repeat_interleave(columns, 3).tril()
    return scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=enable_gqa)


def test_a_row_on_the_cpu() -> None:
    row = gpu.measure(
        "9/3 × 64",
        256,
        "float32",
        block=32,
        share=0.6,
        device="cpu",
        kernel="torch",
        compiled_flex=masked_dense,
        seconds_of=one_second_each,
    )
    assert row["tokens"] == 256
    assert row["times"] == row["times_flex"] == 4
    assert row["times_with_selection"] == 2
    assert 0 < row["pruned_of_causal"] < 1
    assert row["attention_ms"] == 2000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_it_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        gpu.main()

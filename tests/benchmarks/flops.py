"""How much of the machine the C++ operator uses: FLOP/s on kept blocks beside plain matmul and dense SDPA.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.flops

A kept block counts 4 · q_block · k_block · d_head operations forward, whatever of it the diagonal hides; dense causal
attention counts half of the square. Each row's programs run in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stream_kernels.cpu import cpu_block_attention_backward, cpu_block_attention_forward
from stream_kernels.rule import ScoreRule
from tests.benchmarks.layer import DTYPES, SHAPES, inputs, plain, require_operator, timed
from tests.benchmarks.measuring import machine, write_results

POINTS = [(4096, 32, 3), (4096, 64, 3), (8192, 32, 6), (8192, 64, 3), (8192, 32, 16), (32768, 32, 16), (32768, 64, 13)]


def kept_blocks(heads: int, blocks: int, k: int) -> Tensor:
    """int32 [1, head, q_blocks, k]: the first block, the diagonal block, and random visible ones between them."""
    random = torch.Generator().manual_seed(0)
    score = torch.rand(1, heads, blocks, blocks, generator=random)
    query, key = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    score = score.masked_fill(key > query, -1).masked_fill((key == query) | (key == 0), 2)
    best = score.topk(min(k, blocks), -1)
    ascending = torch.where(best.values >= 0, best.indices, blocks).sort(-1).values
    return ascending.where(ascending < blocks, -1).int()


def measure(shape: str, length: int, block: int, k: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    heads, kv_heads, d_head = SHAPES[shape]
    q, key, value = inputs(shape, length, dtype)
    grad_out = torch.randn_like(q)
    indices, rule = kept_blocks(heads, length // block, k), ScoreRule(d_head**-0.5)
    sizes = {"q_block": block, "k_block": block}
    out, logsumexp, _ = cpu_block_attention_forward(q, key, value, indices, rule, **sizes)
    square = torch.randn(1024, 1024).to(DTYPES[dtype])
    programs: dict[str, Callable[[], object]] = {
        "forward": lambda: cpu_block_attention_forward(q, key, value, indices, rule, **sizes),
        "backward": lambda: cpu_block_attention_backward(
            q, key, value, indices, rule, logsumexp, out, grad_out, **sizes
        ),
        "matmul": lambda: square @ square,
    }
    if length <= options.dense_until:
        keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        programs["dense"] = lambda: scaled_dot_product_attention(q, keys, values, is_causal=True)
    times = timed(programs, options.repeats, options.budget_s)
    kept = int((indices >= 0).sum())
    row: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype,
        "tokens": length,
        "block": block,
        "k": k,
        "seconds": plain(times),
    }
    row["forward_gflops"] = 4e-9 * kept * block * block * d_head / times["forward"].median
    row["backward_gflops"] = 10e-9 * kept * block * block * d_head / times["backward"].median
    row["matmul_gflops"] = 2e-9 * 1024**3 / times["matmul"].median
    row["of_matmul"] = row["forward_gflops"] / row["matmul_gflops"]
    if "dense" in times:
        row["dense_gflops"] = 2e-9 * heads * length**2 * d_head / times["dense"].median
        row["of_dense"] = row["forward_gflops"] / row["dense_gflops"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget-s", type=float, default=10, help="seconds a row may take, if it can")
    parser.add_argument("--dense-until", type=int, default=8192, help="tokens above which dense SDPA is left out")
    options = parser.parse_args()
    require_operator()
    before = machine()
    with torch.no_grad():
        rows = [measure(s, *point, dtype, options) for dtype in DTYPES for s in SHAPES for point in POINTS]
    print(before, pd.DataFrame(rows).drop(columns="seconds").to_string(index=False, float_format="%.2f"), sep="\n")
    print(write_results("flops", rows, before=before))


if __name__ == "__main__":
    main()

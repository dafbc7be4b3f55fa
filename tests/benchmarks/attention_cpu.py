"""The C++ operator against dense causal SDPA and plain matmul, mask given: one command, a table and a JSON.

    OMP_NUM_THREADS=2 python tests/benchmarks/attention_cpu.py --out attention_cpu.json

Each row's three programs run in turn, so that a slow spell of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stream_kernels.cpu import cpu_available, cpu_block_attention_backward, cpu_block_attention_forward
from stream_kernels.rule import ScoreRule

SHAPES = {"9/3 × 64": (9, 3, 64), "4/1 × 256": (4, 1, 256)}
POINTS = [(4096, 32, 3), (4096, 64, 2), (8192, 32, 6), (8192, 64, 3), (8192, 32, 16), (32768, 32, 16), (32768, 64, 13)]


def kept_blocks(heads: int, blocks: int, k: int) -> Tensor:
    """int32 [1, head, q_blocks, k]: the first block, the diagonal block, and random visible ones between them."""
    random = torch.Generator().manual_seed(0)
    score = torch.rand(1, heads, blocks, blocks, generator=random)
    query, key = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    score = score.masked_fill(key > query, -1).masked_fill((key == query) | (key == 0), 2)
    best = score.topk(min(k, blocks), -1)
    ascending = torch.where(best.values >= 0, best.indices, blocks).sort(-1).values
    return ascending.where(ascending < blocks, -1).int()


def time_in_turn(programs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, programs interleaved, after one run each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(shape: str, length: int, block: int, k: int, dtype: torch.dtype, repeats: int, longest_dense: int) -> dict:
    """One row of the table; dense runs are left out (None) above ``longest_dense`` tokens."""
    heads, kv_heads, d_head = SHAPES[shape]
    q, grad_out = (torch.randn(1, heads, length, d_head).to(dtype) for _ in range(2))
    key, value = (torch.randn(1, kv_heads, length, d_head).to(dtype) for _ in range(2))
    indices, rule = kept_blocks(heads, length // block, k), ScoreRule(d_head**-0.5)
    blocks = {"q_block": block, "k_block": block}
    out, logsumexp, _ = cpu_block_attention_forward(q, key, value, indices, rule, **blocks)
    all_keys, all_values = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    square = torch.randn(1024, 1024).to(dtype)
    programs = {
        "forward": lambda: cpu_block_attention_forward(q, key, value, indices, rule, **blocks),
        "backward": lambda: cpu_block_attention_backward(
            q, key, value, indices, rule, logsumexp, out, grad_out, **blocks
        ),
        "matmul": lambda: square @ square,
    }
    if length <= longest_dense:
        programs["dense"] = lambda: scaled_dot_product_attention(q, all_keys, all_values, is_causal=True)
    runs = time_in_turn(programs, repeats)
    median = {name: statistics.median(seconds) for name, seconds in runs.items()}
    kept = int((indices >= 0).sum())
    causal = heads * (length // block) * (length // block + 1) / 2
    dense = median.get("dense")
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": length,
        "block": block,
        "k": k,
        "pruned_of_causal": 1 - kept / causal,
        "forward_ms": 1e3 * median["forward"],
        "backward_ms": 1e3 * median["backward"],
        "dense_ms": 1e3 * dense if dense else None,
        "times_faster": dense / median["forward"] if dense else None,
        "kept_gflops": 4 * kept * block * block * d_head / median["forward"] / 1e9,
        "matmul_gflops": 2 * 1024**3 / median["matmul"] / 1e9,
        "dense_gflops": 2 * heads * length**2 * d_head / dense / 1e9 if dense else None,
        "min_max_ms": {name: [1e3 * min(seconds), 1e3 * max(seconds)] for name, seconds in runs.items()},
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("attention_cpu.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest-dense", type=int, default=8192, help="tokens above which dense SDPA is left out")
    options = parser.parse_args()
    live, reason = cpu_available()
    if not live:
        raise SystemExit(reason)
    rows = [
        measure(shape, *point, dtype, options.repeats, options.longest_dense)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in SHAPES
        for point in POINTS
    ]
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    machine["instructions"] = torch.backends.cpu.get_cpu_capability()
    aside = options.out.with_suffix(".part")
    aside.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    os.replace(aside, options.out)
    print(machine)
    print(pd.DataFrame(rows).drop(columns="min_max_ms").to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()

"""Attention of one layer on a GPU: the Triton kernels beside dense SDPA and flex_attention with the same mask.

    python -m tests.benchmarks.gpu

Every program of a row runs in turn; CUDA events take the time on the device. `times` are dense milliseconds over ours,
with the mask given and with the search included. Writes results/gpu.json with the device's name.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from stream_lens.blocks import BlockMask, StreamConfig, block_sparse_attention, select_blocks, to_flex
from stream_lens.blocks.kernel_choice import Kernel
from tests.benchmarks.layer import SHAPES, blocks_kept, inputs
from tests.benchmarks.measuring import machine, write_results

Program = Callable[[], object]


def event_seconds(programs: Mapping[str, Program], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run between two CUDA events, all in turn; three rounds before it compile and warm up."""
    for _ in range(3):
        for program in programs.values():
            program()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            program()
            stop.record()
            stop.synchronize()
            seconds[name].append(start.elapsed_time(stop) / 1e3)
    return seconds


def flex_program(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, compiled: Callable[..., Any]) -> Program:
    table = to_flex(mask)
    return lambda: compiled(q, k, v, block_mask=table, enable_gqa=True)


def measure(
    shape: str,
    length: int,
    dtype: str,
    *,
    block: int,
    share: float,
    device: str = "cuda",
    kernel: Kernel = "triton",
    compiled_flex: Callable[..., Any],
    seconds_of: Callable[[Mapping[str, Program]], dict[str, list[float]]],
) -> dict[str, Any]:
    """One row; ours is compared with flex_attention on the same blocks before anything is timed."""
    heads, kv_heads, _ = SHAPES[shape]
    q, k, v = (x.to(device) for x in inputs(shape, length, dtype))
    config = StreamConfig(q_block=block, k_block=block, k=blocks_kept(length, block, share))
    mask = select_blocks(q, k, config, kernel=kernel)
    keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    flex = flex_program(q, k, v, mask, compiled_flex)
    ours = block_sparse_attention(q, k, v, mask, kernel=kernel).out
    torch.testing.assert_close(ours, flex(), rtol=2e-2, atol=2e-2)
    taken = seconds_of(
        {
            "attention": lambda: block_sparse_attention(q, k, v, mask, kernel=kernel),
            "selection": lambda: select_blocks(q, k, config, kernel=kernel),
            "dense": lambda: scaled_dot_product_attention(q, keys, values, is_causal=True),
            "flex": flex,
        }
    )
    median = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "shape": shape,
        "dtype": dtype,
        "tokens": length,
        "block": block,
        "k": config.k,
        "pruned_of_causal": mask.sparsity("causal"),
        **{f"{name}_ms": 1e3 * seconds for name, seconds in median.items()},
        "times": median["dense"] / median["attention"],
        "times_with_selection": median["dense"] / (median["attention"] + median["selection"]),
        "times_flex": median["dense"] / median["flex"],
        "seconds": taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--block", type=int, default=128, help="q_block and k_block; flex_attention wants 128 on GPUs")
    parser.add_argument("--share", type=float, default=0.05, help="most of the causal half that is kept")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: run this benchmark on a machine with one.")
    rows = []
    for dtype in options.dtypes:
        for shape in SHAPES:
            for length in options.lengths:
                torch._dynamo.reset()  # a recompilation too many would fall back to a dense form
                row = measure(
                    shape,
                    length,
                    dtype,
                    block=options.block,
                    share=options.share,
                    compiled_flex=torch.compile(flex_attention, fullgraph=True, dynamic=False),
                    seconds_of=lambda programs: event_seconds(programs, options.repeats),
                )
                rows.append(row)
    before = machine()
    print(before["device"], pd.DataFrame(rows).drop(columns="seconds").to_string(index=False, float_format="%.3g"))
    print(write_results("gpu", rows))


if __name__ == "__main__":
    main()

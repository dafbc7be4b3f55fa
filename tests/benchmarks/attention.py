"""Block-sparse attention beside dense SDPA and flex_attention with the same mask, with and without the search.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.attention

Every program of a row runs in turn in one process; `times` are dense milliseconds over ours. The dense run gets keys
repeated for each query head beforehand, outside the clock. flex_attention is compiled for every length: uncompiled, and
after a few recompilations, it falls back to a dense form that ignores the mask, so both are made errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from stream_lens.blocks import BlockMask, StreamConfig, block_sparse_attention, select_blocks, to_flex
from tests.benchmarks.layer import SHAPES, blocks_kept, inputs, plain, require_operator, timed
from tests.benchmarks.measuring import machine, write_results

OURS = ("cpp", "torch")


def flex_program(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
    """Compiled for these shapes, and checked against ours: silently dense would be faster to find than to explain."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    table = to_flex(mask)

    def run() -> Tensor:
        return compiled(q, k, v, block_mask=table, enable_gqa=True)

    ours = block_sparse_attention(q, k, v, mask, kernel="cpp").out
    torch.testing.assert_close(run().float(), ours.float(), rtol=2e-2, atol=2e-2)
    return run


def measure(shape: str, length: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    heads, kv_heads, _ = SHAPES[shape]
    q, k, v = inputs(shape, length, dtype)
    kept = blocks_kept(length, options.block, options.share)
    config = StreamConfig(q_block=options.block, k_block=options.block, k=kept)
    mask = select_blocks(q, k, config)
    programs: dict[str, Callable[[], object]] = {}
    for kernel in OURS:
        programs[f"{kernel} attention"] = lambda kernel=kernel: block_sparse_attention(q, k, v, mask, kernel=kernel)
        programs[f"{kernel} selection"] = lambda kernel=kernel: select_blocks(q, k, config, kernel=kernel)
    if length <= options.dense_until:
        keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        programs["dense"] = lambda: scaled_dot_product_attention(q, keys, values, is_causal=True)
    if length <= options.flex_until:
        programs["flex"] = flex_program(q, k, v, mask)
    times = timed(programs, options.repeats, options.budget_s)
    row: dict[str, Any] = {"shape": shape, "dtype": dtype, "tokens": length, "block": options.block, "k": kept}
    row["pruned_of_causal"] = mask.sparsity("causal")
    row["seconds"] = plain(times)
    if "dense" in times:
        dense = times["dense"].median
        for kernel in OURS:
            attention, search = (times[f"{kernel} {work}"].median for work in ("attention", "selection"))
            row[f"times_{kernel}"] = dense / attention
            row[f"times_{kernel}_with_selection"] = dense / (attention + search)
        if "flex" in times:
            row["times_flex"] = dense / times["flex"].median
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--block", type=int, default=64, help="q_block and k_block")
    parser.add_argument("--share", type=float, default=0.05, help="most of the causal half that is kept")
    parser.add_argument("--dense-until", type=int, default=32768, help="tokens above which dense SDPA is left out")
    parser.add_argument("--flex-until", type=int, default=16384, help="the same for flex_attention")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=15, help="seconds a row may take, if it can")
    parser.add_argument("--name", default="attention", help="of the file in results/")
    options = parser.parse_args()
    require_operator()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    before, rows, medians = machine(), [], []
    with torch.no_grad():
        for dtype in options.dtypes:
            for shape in SHAPES:
                for length in options.lengths:
                    rows.append(measure(shape, length, dtype, options))
                    medians.append({f"{name} ms": 1e3 * x["median_s"] for name, x in rows[-1]["seconds"].items()})
    table = pd.concat([pd.DataFrame(rows).drop(columns="seconds"), pd.DataFrame(medians)], axis=1)
    print(before, table.to_string(index=False, float_format="%.2f"), sep="\n")
    print(write_results(options.name, rows, before=before))


if __name__ == "__main__":
    main()

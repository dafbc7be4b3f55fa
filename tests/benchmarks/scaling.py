"""Time and memory of selection and attention as the text grows, at a fixed k and, apart, at a fixed kept fraction.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.scaling            # 8k to 256k tokens
    OMP_NUM_THREADS=2 python -m tests.benchmarks.scaling --million  # and one key head's group at 1M tokens

`slope` is the exponent of a straight line through the logarithms: 1 is linear. Memory is what a call adds at its peak
to what lies there already; `total_mib` counts the inputs too. A fixed fraction keeps k in proportion to the length, so
its work is quadratic by definition; it is here to show how it compares with a fixed k.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from stream_lens.blocks import FractionOfPrefix, StreamConfig, block_sparse_attention, select_blocks
from stream_lens.plots.scaling import slope as exponent
from tests.benchmarks.layer import SHAPES, inputs, plain, require_operator, timed
from tests.benchmarks.measuring import machine, peak_bytes, write_results

LENGTHS = [8192, 16384, 32768, 65536, 131072, 262144]


def measure(shape: str, length: int, config: StreamConfig, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    q, k, v = inputs(shape, length, options.dtype)
    mask = select_blocks(q, k, config)
    programs: dict[str, Callable[[], object]] = {
        "selection": lambda: select_blocks(q, k, config),
        "attention": lambda: block_sparse_attention(q, k, v, mask),
    }
    memory = {f"{name}_mib": peak_bytes(program) / 2**20 for name, program in programs.items()}
    times = timed(programs, options.repeats, options.budget_s)
    row: dict[str, Any] = {"kind": kind, "shape": shape, "dtype": options.dtype, "tokens": length, "k": mask.k}
    row |= {"pruned_of_causal": mask.sparsity("causal"), "inputs_mib": sum(x.nbytes for x in (q, k, v)) / 2**20}
    row |= {f"{name}_ms": 1e3 * x.median for name, x in times.items()} | memory | {"seconds": plain(times)}
    row["total_ms"] = row["selection_ms"] + row["attention_ms"]
    row["total_mib"] = row["inputs_mib"] + max(memory.values())
    return row


def slope(rows: list[dict[str, Any]], field: str) -> float | None:
    """The exponent of `field` in the number of tokens."""
    points = [(row["tokens"], row[field]) for row in rows if row[field]]
    return exponent(pd.DataFrame(points, columns=["T", field]), field)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, default=32, help="q_block and k_block")
    parser.add_argument("--k", type=int, default=16, help="blocks kept per query block at fixed k")
    parser.add_argument("--fraction", type=float, default=0.05, help="share of the prefix kept at a fixed fraction")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--longest-fraction", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=12, help="seconds a row may take, if it can")
    parser.add_argument(
        "--million", action="store_true", help="add 1,048,576 tokens, three query heads on one key head"
    )
    options = parser.parse_args()
    require_operator()
    blocks = {"q_block": options.block, "k_block": options.block}
    fixed = StreamConfig(k=options.k, **blocks)
    share = StreamConfig(k=FractionOfPrefix(options.fraction), **blocks)
    before, rows, slopes = machine(), [], []
    with torch.no_grad():
        for kind, config, longest in (
            ("fixed k", fixed, options.longest),
            ("fixed fraction", share, options.longest_fraction),
        ):
            for shape in SHAPES:
                series = [measure(shape, n, config, kind, options) for n in LENGTHS if n <= longest]
                fields = ("selection_ms", "attention_ms", "total_ms", "selection_mib", "attention_mib", "total_mib")
                slopes.append({"kind": kind, "shape": shape, **{field: slope(series, field) for field in fields}})
                rows += series
        if options.million:
            SHAPES["3/1 × 64"] = (3, 1, 64)
            rows.append(measure("3/1 × 64", 1 << 20, fixed, "fixed k", options))
    table = pd.DataFrame(rows).drop(columns="seconds")
    print(before, table.to_string(index=False, float_format="%.2f"), sep="\n")
    print(pd.DataFrame(slopes).to_string(index=False, float_format="%.3f"))
    print(write_results("scaling", rows, before=before, slopes=slopes))


if __name__ == "__main__":
    main()

"""Benchmark (e): a whole forward of Gemma 3 270M with all masks in the cache, against transformers with SDPA and none.

    python -m tests.benchmarks.whole_model [--lengths 8192,16384,32768] [--repeats 1] [--k 16]

Both give the last position's logits. Sparse: `run_with_masks` on a TransformerBridge with a constant k, blocks of
64 × 64. Dense: `model(..., logits_to_keep=1)` with the "sdpa" implementation,
what a user without any interest in patterns runs.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import stream_lens as sl
from stream_lens.demo_models import DEMO_MODELS, demo_folder
from tests.benchmarks.measuring import interleaved, peak_bytes, print_table, write_results

BLOCK = 64


def compare(bridge: Any, plain: Any, length: int, k: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    tokens = torch.randint(10, 50_000, (1, length), generator=torch.Generator().manual_seed(0))
    caches: dict[str, Any] = {}

    def sparse() -> None:
        caches["sparse"] = sl.run_with_masks(bridge, tokens, k=k, q_block=BLOCK, k_block=BLOCK, keep_scores=False)[1]

    def dense() -> None:
        with torch.no_grad():
            plain(tokens, logits_to_keep=1)

    runs = {"sparse": sparse, "dense": dense}
    times = interleaved(runs, repeats, warmup=1 if length <= 8192 else 0)
    peaks = {name: peak_bytes(run) for name, run in runs.items()} if length <= 8192 else {}
    cache = caches["sparse"]
    return {
        "T": length,
        "k": k,
        "pruned_global": sum(cache.masks()[layer].sparsity("causal") for layer in (5, 11, 17)) / 3,
        "sparse_s": times["sparse"].median,
        "dense_s": times["dense"].median,
        "times_faster": times["dense"].median / times["sparse"].median,
        "masks_mb": cache.compression().sparse_bytes / 1e6,
        "sparse_peak_mb": peaks.get("sparse", 0) / 1e6 or None,
        "dense_peak_mb": peaks.get("dense", 0) / 1e6 or None,
        "timings": {name: timing.plain() for name, timing in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    lengths = [int(part) for part in options.lengths.split(",")]
    demo = DEMO_MODELS["gemma-3-270m"]
    bridge = sl.load_demo_model(demo.name, as_="bridge")
    plain = AutoModelForCausalLM.from_pretrained(demo_folder(demo), attn_implementation="sdpa", dtype=torch.float32)
    rows = [compare(bridge, plain.eval(), length, options.k, options.repeats) for length in lengths]
    shown = [{name: value for name, value in row.items() if name != "timings"} for row in rows]
    print_table("whole forward of Gemma 3 270M: all masks cached, against transformers with SDPA and no masks", shown)
    if not options.no_save:
        print(write_results("whole_model", rows))


if __name__ == "__main__":
    main()

"""Benchmark (a): `run_with_cache` sparse against dense TransformerLens: time and peak memory at 1k, 2k and 4k tokens.

    python -m tests.benchmarks.run_with_cache [--lengths 1024,2048,4096] [--repeats 3] [--real]

Two comparisons, each with the same call on both sides:

- "toy": a random HookedTransformer of 4 layers, 8 heads (4 of keys), d_model 256, vocabulary 1,000; plain
  ``model.run_with_cache(tokens)``, everything cached.
- "gemma-3-270m" (--real): patterns cached, logits of the last position only, on both sides, so that a vocabulary of
  262,144 does not hide what attention takes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch

import stream_lens as sl
from stream_lens.backend.long_inputs import last_logits_only
from tests.benchmarks.measuring import interleaved, peak_bytes, print_table, write_results

K = 8


def toy(n_ctx: int) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=4,
            d_model=256,
            d_head=32,
            n_heads=8,
            n_key_value_heads=4,
            d_vocab=1000,
            n_ctx=n_ctx,
            act_fn="silu",
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=32,
        )
    ).eval()


def _patterns_only(name: str) -> bool:
    return name.endswith("hook_pattern")


def sides(model: Any, tokens: torch.Tensor, *, real: bool) -> dict[str, Callable[[], object]]:
    """The same call, dense and streamed."""

    def run() -> object:
        with torch.no_grad():
            if not real:
                return model.run_with_cache(tokens)
            with last_logits_only(model, 1):
                return model.run_with_cache(tokens, names_filter=_patterns_only)

    def sparse() -> object:
        with sl.stream(model, q_block=32, k_block=32, k=K):
            return run()

    return {"sparse": sparse, "dense": run}


def compare(name: str, model: Any, length: int, repeats: int, *, real: bool) -> dict[str, Any]:
    """One row of the table."""
    tokens = torch.randint(10, 900, (1, length), generator=torch.Generator().manual_seed(0))
    runs = sides(model, tokens, real=real)
    times = interleaved(runs, repeats)
    peaks = {side: peak_bytes(run) for side, run in runs.items()}
    return {
        "model": name,
        "T": length,
        "k": K,
        "sparse_s": times["sparse"].median,
        "dense_s": times["dense"].median,
        "times_faster": times["dense"].median / times["sparse"].median,
        "sparse_peak_mb": peaks["sparse"] / 1e6,
        "dense_peak_mb": peaks["dense"] / 1e6,
        "times_less_memory": peaks["dense"] / max(peaks["sparse"], 1),
        "timings": {side: timing.plain() for side, timing in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="also Gemma 3 270M (needs the demo extra)")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    lengths = [int(part) for part in options.lengths.split(",")]
    rows = [compare("toy", toy(max(lengths)), length, options.repeats, real=False) for length in lengths]
    if options.real:
        model = sl.load_demo_model("gemma-3-270m", as_="hooked", n_ctx=max(lengths))
        rows += [compare("gemma-3-270m", model, length, options.repeats, real=True) for length in lengths]
    shown = [{name: value for name, value in row.items() if name != "timings"} for row in rows]
    print_table("run_with_cache, sparse against dense TransformerLens", shown)
    if not options.no_save:
        print(write_results("run_with_cache", rows))


if __name__ == "__main__":
    main()

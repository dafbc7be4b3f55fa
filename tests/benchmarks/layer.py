"""Random inputs of one layer in the shapes of the two demo models, and timing within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from stream_kernels.cpu import cpu_available
from tests.benchmarks.measuring import Timing, interleaved

SHAPES = {"9/3 × 64": (9, 3, 64), "4/1 × 256": (4, 1, 256)}  # query heads / key heads × d_head: SmolLM2, Gemma 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(shape: str, length: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v of one layer."""
    heads, kv_heads, d_head = SHAPES[shape]
    random = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, h, length, d_head, generator=random) for h in (heads, kv_heads, kv_heads))
    return q.to(DTYPES[dtype]), k.to(DTYPES[dtype]), v.to(DTYPES[dtype])


def blocks_kept(length: int, block: int, share: float) -> int:
    """The k that keeps at most `share` of the causal half, and no fewer than 3 blocks."""
    return max(3, int(share * (length // block + 1) / 2))


def timed(programs: dict[str, Callable[[], object]], repeats: int, budget_s: float) -> dict[str, Timing]:
    """All in turn, `repeats` times or as often as fits the budget, once at least; a first round warms up."""
    start = time.perf_counter()
    for program in programs.values():
        program()
    fits = int(budget_s / (time.perf_counter() - start))
    return interleaved(programs, max(1, min(repeats, fits)), warmup=0)


def plain(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: timing.plain() for name, timing in timings.items()}


def require_operator() -> None:
    """Ends the program, with the reason, where the C++ operators are not live."""
    live, reason = cpu_available()
    if not live:
        raise SystemExit(reason)

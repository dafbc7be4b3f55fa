"""What the selection kernel supports, and the tile sizes and warps it is compiled with.

Every shape within these limits was compiled for every architecture and spills no register
(`tests/ops/compile_all.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from stream_kernels.launch import MAX_HEAD_DIM, register_options

REPRESENTATIVES = {"mean": 0, "first": 1, "centre": 2, "last": 3, "strided": 4, "mean_var": 5}
REDUCTIONS = {"max": 0, "mass": 1, "peak": 2}
SMALLEST_DOT = 16  # tl.dot takes no smaller dimension
MAX_K_BLOCK = 128
MAX_ROWS = 64
MAX_BRANCHES = 512
LANES = 64  # keys scored at a time: several small blocks


def unsupported(
    *,
    d_head: int,
    q_block: int,
    k_block: int,
    slots: int,
    representative: str,
    reduce: str,
    rank: str,
    oversample: int,
    query_stride: int,
) -> str | None:
    """One sentence that says why the kernel cannot run such a search; None when it can.

    Ask `stream_kernels.launch.why_not_triton` about device and dtype.
    """
    if representative not in REPRESENTATIVES:
        return (
            f"the Triton search takes the representatives {', '.join(REPRESENTATIVES)}, not {representative!r}: "
            "use the torch path."
        )
    for name, value in (("reduce", reduce), ("rank", rank)):
        if value not in REDUCTIONS:
            return f"the Triton search takes {name} {', '.join(REDUCTIONS)}, not {value!r}: use the torch path."
    rows = -(-q_block // query_stride)
    for what, size, most in (
        ("head dimensions", d_head, MAX_HEAD_DIM),
        ("k_block", k_block, MAX_K_BLOCK),
        ("scored rows of a query block (q_block / query_stride)", rows, MAX_ROWS),
        ("branches (oversample · slots)", oversample * slots, MAX_BRANCHES),
    ):
        if size > most:
            return f"the Triton search takes {what} up to {most}, not {size}: use the torch path."
    return None


def compile_constants(
    architecture: str,
    dtype: torch.dtype,
    *,
    d_head: int,
    q_block: int,
    k_block: int,
    query_len: int,
    slots: int,
    representative: str,
    reduce: str,
    rank: str,
    oversample: int,
    query_stride: int,
) -> dict[str, Any]:
    """The constants the kernel is compiled with, its options included."""
    k_pad = _power_of_two(k_block)
    lanes = max(LANES, k_pad)
    branches = max(_power_of_two(oversample * slots), lanes)
    rows = max(SMALLEST_DOT, _power_of_two(-(-min(q_block, query_len) // query_stride)))
    # AMD's programs of eight warps have half the registers a thread of those of four; NVIDIA's have as many.
    heavy = representative == "mean_var" or lanes * rows > 2048
    num_warps = 8 if branches > 256 or (heavy and not architecture.startswith("gfx")) else 4
    key_chunk = 32 if dtype == torch.float32 else 64
    if representative == "mean_var" and lanes * rows > 2048 and not architecture.startswith("gfx"):
        key_chunk = SMALLEST_DOT  # 128 keys by 32 rows: more spills on sm_80 and sm_100
    return {
        "KEY_CHUNK": min(max(SMALLEST_DOT, _power_of_two(d_head)), key_chunk),
        "MEAN_CHUNK": SMALLEST_DOT,
        "Q_BLOCK": q_block,
        "K_BLOCK": k_block,
        "K_PAD": k_pad,
        "QUERY_STRIDE": query_stride,
        "OVERSAMPLE": oversample,
        "ROWS": rows,
        "BRANCHES": branches,
        "SLOTS_PAD": _power_of_two(slots),
        "LANES": lanes,
        "REPRESENTATIVE": REPRESENTATIVES[representative],
        "REDUCE": REDUCTIONS[reduce],
        "RANK": REDUCTIONS[rank],
        "num_warps": num_warps,
        "num_stages": 1,
    } | register_options(architecture)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

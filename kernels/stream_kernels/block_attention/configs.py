"""Tile sizes, warps and pipeline stages of the block-attention kernels, per architecture and head dimension.

Every row was compiled for its architecture and spills no register (`tests/ops/compile_all.py`). Rows are the largest
tiles of a few that pass that check; none has been timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from stream_kernels.launch import register_options

Kernel = Literal["forward", "query_gradient", "key_gradient"]


@dataclass(frozen=True)
class Tiles:
    """`rows` × `keys` scores at a time; both are upper limits, cut to the call's block sizes."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# kernel -> architecture family -> (half precision?, padded head dimension) -> tiles
TILES: dict[Kernel, dict[str, dict[tuple[bool, int], Tiles]]] = {
    "forward": {
        "sm_80": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 64, 8, 2),
            (True, 256): Tiles(32, 32, 8, 2),
            (False, 64): Tiles(32, 32, 4, 2),
            (False, 128): Tiles(32, 32, 8, 2),
            (False, 256): Tiles(16, 16, 4, 2),
        },
        "sm_90": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 64, 4, 2),
            (True, 256): Tiles(64, 32, 8, 2),
            (False, 64): Tiles(32, 32, 4, 2),
            (False, 128): Tiles(32, 32, 8, 2),
            (False, 256): Tiles(16, 16, 8, 2),
        },
        "sm_100": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 64, 8, 2),
            (True, 256): Tiles(32, 32, 8, 2),
            (False, 64): Tiles(32, 32, 8, 2),
            (False, 128): Tiles(32, 16, 8, 2),
            (False, 256): Tiles(16, 16, 8, 2),
        },
        "gfx942": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 64, 4, 2),
            (True, 256): Tiles(32, 32, 4, 2),
            (False, 64): Tiles(32, 32, 4, 2),
            (False, 128): Tiles(32, 32, 4, 2),
            (False, 256): Tiles(16, 16, 4, 2),
        },
    },
    "query_gradient": {
        "sm_80": {
            (True, 64): Tiles(64, 64, 8, 2),
            (True, 128): Tiles(64, 64, 8, 2),
            (True, 256): Tiles(32, 32, 8, 2),
            (False, 64): Tiles(32, 32, 4, 2),
            (False, 128): Tiles(32, 16, 8, 2),
            (False, 256): Tiles(16, 16, 4, 2),
        },
        "sm_90": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 64, 8, 2),
            (True, 256): Tiles(64, 32, 8, 2),
            (False, 64): Tiles(32, 32, 8, 2),
            (False, 128): Tiles(32, 16, 8, 2),
            (False, 256): Tiles(16, 16, 8, 2),
        },
        "sm_100": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 64, 4, 2),
            (True, 256): Tiles(64, 32, 8, 2),
            (False, 64): Tiles(32, 32, 8, 2),
            (False, 128): Tiles(32, 16, 8, 2),
            (False, 256): Tiles(16, 16, 8, 2),
        },
        "gfx942": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 32, 4, 2),
            (True, 256): Tiles(32, 16, 4, 2),
            (False, 64): Tiles(32, 32, 4, 2),
            (False, 128): Tiles(32, 32, 4, 2),
            (False, 256): Tiles(16, 16, 4, 2),
        },
    },
    "key_gradient": {
        "sm_80": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 64, 8, 2),
            (True, 256): Tiles(32, 32, 8, 2),
            (False, 64): Tiles(32, 32, 4, 2),
            (False, 128): Tiles(32, 16, 8, 2),
            (False, 256): Tiles(16, 16, 4, 2),
        },
        "sm_90": {
            (True, 64): Tiles(64, 64, 8, 2),
            (True, 128): Tiles(64, 32, 8, 2),
            (True, 256): Tiles(32, 32, 8, 2),
            (False, 64): Tiles(32, 32, 8, 2),
            (False, 128): Tiles(16, 16, 4, 1),
            (False, 256): Tiles(16, 16, 8, 2),
        },
        "sm_100": {
            (True, 64): Tiles(64, 64, 8, 2),
            (True, 128): Tiles(64, 64, 8, 2),
            (True, 256): Tiles(32, 32, 8, 2),
            (False, 64): Tiles(32, 32, 8, 2),
            (False, 128): Tiles(16, 16, 4, 1),
            (False, 256): Tiles(16, 16, 8, 2),
        },
        "gfx942": {
            (True, 64): Tiles(64, 64, 4, 2),
            (True, 128): Tiles(64, 32, 4, 2),
            (True, 256): Tiles(32, 16, 4, 2),
            (False, 64): Tiles(32, 32, 4, 2),
            (False, 128): Tiles(16, 16, 4, 2),
            (False, 256): Tiles(16, 16, 4, 2),
        },
    },
}

SMALLEST_DOT = 16  # tl.dot takes no smaller dimension; narrower heads and blocks are padded with zeros


def compile_constants(
    kernel: Kernel, architecture: str, dtype: torch.dtype, *, d_head: int, q_block: int, k_block: int, query_len: int
) -> dict[str, Any]:
    """The constants a kernel is compiled with, its options included."""
    d_pad = max(SMALLEST_DOT, _power_of_two(d_head))
    tiles = TILES[kernel][_family(architecture)][dtype != torch.float32, max(64, d_pad)]
    return {
        "D": d_head,
        "D_PAD": d_pad,
        "Q_BLOCK": q_block,
        "K_BLOCK": k_block,
        "TILE_ROWS": _cut(min(q_block, query_len), tiles.rows),
        "TILE_KEYS": _cut(k_block, tiles.keys),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    } | register_options(architecture)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _cut(size: int, limit: int) -> int:
    """The smallest power of two that holds `size`, no less than tl.dot takes and no more than the limit."""
    return min(max(SMALLEST_DOT, _power_of_two(size)), limit)


def _family(architecture: str) -> str:
    """The architecture whose tiles to use: sm_80's fit every NVIDIA GPU since Ampere, gfx942's every CDNA."""
    if architecture in TILES["forward"]:
        return architecture
    return "gfx942" if architecture.startswith("gfx") else "sm_80"

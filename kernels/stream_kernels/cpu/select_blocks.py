"""The hierarchical search for key blocks on the CPU: the C++ operator behind one plain function.

Definition: `stream_lens.blocks.hierarchical`, which it follows block for block; how it works: README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_kernels.cpu.library import define, require_cpu_operators
from stream_kernels.rule import ScoreRule

REPRESENTATIVES = ("first", "centre", "last", "strided", "mean", "mean_var")
REDUCTIONS = ("max", "mass", "peak")

define(
    "select_blocks(Tensor q, Tensor k, Tensor ranges, Tensor free, int q_block, int k_block, float scale, int offset, "
    "int? window, float? softcap, Tensor? key_mask, str representative, str reduce, str rank, int oversample, "
    "int query_stride, int slots, int rounds) -> Tensor"
)


def cpu_select_blocks(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    rule: ScoreRule,
    *,
    first: Int[Tensor, "batch q_blocks"],
    sink_stop: Int[Tensor, "batch q_blocks"],
    local_start: Int[Tensor, "batch q_blocks"],
    stop: Int[Tensor, "batch q_blocks"],
    free: Int[Tensor, "batch head q_blocks"],
    slots: int,
    rounds: int,
    q_block: int,
    k_block: int,
    representative: str,
    reduce: str,
    rank: str,
    oversample: int,
    query_stride: int,
) -> Int[Tensor, "batch head q_blocks slots"]:
    """The key blocks every query block keeps, ascending int32, -1 in slots left empty at the end.

    Args:
        q, k: float32 or bfloat16 on the CPU; scored in float32.
        first, sink_stop, local_start, stop: ranges of key blocks. ``[first, sink_stop)`` and ``[local_start, stop)``
            are kept outright; the search runs over ``[sink_stop, local_start)``, which every row stands beyond.
        free: blocks to keep besides those; at most ``slots`` together.
        rounds: halvings after which every branch is one block, for any row.
        representative, reduce, rank, oversample, query_stride: as in `stream_lens.StreamConfig`.

    Raises:
        RuntimeError: the operator is not available.
        TypeError: another dtype. ValueError: shapes or a choice that do not fit.
    """
    require_cpu_operators()
    for name, x in (("q", q), ("k", k)):
        if x.device.type != "cpu":
            raise ValueError(f"{name} is on {x.device}; the C++ operator takes CPU tensors")
        if x.dtype not in (torch.float32, torch.bfloat16) or x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}; the C++ operator takes q and k both float32 or both bfloat16")
    batch, heads, query_len, d_head = q.shape
    if k.shape[0] != batch or k.shape[3] != d_head or heads % k.shape[1] or rule.offset + query_len > k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} at offset {rule.offset} and k {tuple(k.shape)} do not fit")
    q_blocks = -(-query_len // q_block)
    key_mask = rule.key_mask
    ranges = torch.stack([first, sink_stop, local_start, stop])
    expected = {
        "ranges": (ranges, (4, batch, q_blocks)),
        "free": (free, (batch, heads, q_blocks)),
        "key_mask": (key_mask, (batch, k.shape[2])),
    }
    for name, (given, shape) in expected.items():
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; give {shape}")
    for name, choice, known in (
        ("representative", representative, REPRESENTATIVES),
        ("reduce", reduce, REDUCTIONS),
        ("rank", rank, REDUCTIONS),
    ):
        if choice not in known:
            raise ValueError(f"{name} {choice!r} is not one of {', '.join(known)}")
    return torch.ops.stream_lens_cpu.select_blocks(
        q, k, ranges, free, q_block, k_block, rule.scale, rule.offset, rule.window, rule.softcap, key_mask,
        representative, reduce, rank, oversample, query_stride, slots, rounds,
    )  # fmt: skip


@torch.library.register_fake("stream_lens_cpu::select_blocks")
def _fake(q: Tensor, k: Tensor, ranges: Tensor, free: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((*free.shape, rest[-2]), dtype=torch.int32)

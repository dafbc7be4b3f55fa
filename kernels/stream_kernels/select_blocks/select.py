"""The search for key blocks, launched (definition: `reference.py`, formulas: `README.md`)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_kernels.block_attention.arguments import readable, strides
from stream_kernels.launch import architecture, launch, require_triton
from stream_kernels.rule import ScoreRule
from stream_kernels.select_blocks.configs import compile_constants, unsupported
from stream_kernels.select_blocks.kernel import _select_blocks_kernel

SCRATCH_BYTES = 128 << 20  # all programs together; longer jobs make each program search for several query blocks
MIN_PROGRAMS = 2048  # enough to fill any GPU even when one program's scratch is large


def select_blocks_triton(
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
        first, sink_stop, local_start, stop: ranges of key blocks. ``[first, sink_stop)`` and ``[local_start, stop)``
            are kept outright; the search runs over ``[sink_stop, local_start)``, which every row stands beyond.
        free: blocks to keep besides those; at most ``slots`` together.
        rounds: halvings after which every branch is one block, for any row.
        representative, reduce, rank, oversample, query_stride: as in `stream_lens.StreamConfig`.

    Raises:
        ValueError: `unsupported` says why such a search cannot run, or shapes do not fit.
        RuntimeError: Triton cannot run on these tensors; `why_not_triton` says why.
    """
    batch, heads, query_len, d_head = q.shape
    sizes: dict[str, Any] = {
        "d_head": d_head, "q_block": q_block, "k_block": k_block, "slots": slots, "representative": representative,
        "reduce": reduce, "rank": rank, "oversample": oversample, "query_stride": query_stride,
    }  # fmt: skip
    reason = unsupported(**sizes)
    if reason is not None:
        raise ValueError(reason[0].upper() + reason[1:])
    require_triton(q)
    q_blocks, k_blocks = -(-query_len // q_block), -(-k.shape[2] // k_block)
    ranges = torch.stack([first, sink_stop, local_start, stop], -1).to(torch.int32).contiguous()
    _check_shapes(q, k, rule, ranges, free, q_blocks)
    counts = key_counts(rule, batch, k.shape[2], k_block, q.device)
    out = torch.empty((batch, heads, q_blocks, slots), dtype=torch.int32, device=q.device)
    jobs = batch * heads * q_blocks
    if jobs == 0:
        return out

    # What no branch is scored by is not made; the kernel then only forms addresses of it.
    sums = squares = torch.empty(1, dtype=torch.float64, device=q.device)
    if representative in ("mean", "mean_var") and rounds > 0:
        sums = key_sums(k.detach(), rule, k_block)
        squares = (
            key_sums(k.detach().to(torch.float32).square(), rule, k_block) if representative == "mean_var" else sums
        )
    q, k = readable(q.detach()), readable(k.detach())
    constants = compile_constants(architecture(q.device), q.dtype, query_len=query_len, **sizes)
    children, rows = 2 * constants["BRANCHES"], constants["ROWS"]
    programs = min(jobs, max(MIN_PROGRAMS, SCRATCH_BYTES // (4 * children * (2 + rows))))
    arguments = constants | strides("q", q) | strides("k", k)
    arguments |= {
        "q_ptr": q,
        "k_ptr": k,
        "sums_ptr": sums,
        "squares_ptr": squares,
        "counts_ptr": counts,
        "key_mask_ptr": None if rule.key_mask is None else rule.key_mask.to(torch.uint8).contiguous(),
        "ranges_ptr": ranges,
        "free_ptr": free.to(torch.int32).contiguous(),
        "out_ptr": out,
        "branches_ptr": torch.empty((programs, children), dtype=torch.int32, device=q.device),
        "logits_ptr": torch.empty((programs, children, rows), device=q.device),
        "scores_ptr": torch.empty((programs, children), device=q.device),
        "jobs": jobs,
        "heads": heads,
        "groups": heads // k.shape[1],
        "q_blocks": q_blocks,
        "k_blocks": k_blocks,
        "slots": slots,
        "rounds": rounds,
        "query_len": query_len,
        "key_len": k.shape[2],
        "offset": rule.offset,
        "window": rule.window or 0,
        "d_head": d_head,
        "scale": float(rule.scale),
        "softcap": float(rule.softcap or 0.0),
        "HAS_KEY_MASK": rule.key_mask is not None,
        "HAS_SOFTCAP": rule.softcap is not None,
        "HAS_WINDOW": rule.window is not None,
    }
    launch(_select_blocks_kernel, (programs,), q.device, arguments)
    return out


def key_counts(
    rule: ScoreRule, batch: int, key_len: int, k_block: int, device: torch.device
) -> Int[Tensor, "batch blocks"]:
    """Real keys before each block, int32 [batch, k_blocks + 1]."""
    edges = torch.arange(-(-key_len // k_block) + 1, device=device) * k_block
    if rule.key_mask is None:
        return edges.clamp(max=key_len).to(torch.int32).expand(batch, -1).contiguous()
    before = torch.nn.functional.pad(rule.key_mask.to(device).cumsum(-1), (1, 0))
    return before[:, edges.clamp(max=key_len)].to(torch.int32)


def key_sums(
    k: Float[Tensor, "batch kv_head key d_head"], rule: ScoreRule, k_block: int
) -> Float[Tensor, "batch kv_head blocks d_head"]:
    """Sums of the real keys before each block, float64 [batch, kv_head, k_blocks + 1, d_head]."""
    keys = k.to(torch.float32)
    if rule.key_mask is not None:
        keys = keys * rule.key_mask.to(k.device)[:, None, :, None]
    keys = torch.nn.functional.pad(keys, (0, 0, 0, -k.shape[2] % k_block))
    sums = keys.unflatten(2, (-1, k_block)).sum(3)
    return torch.nn.functional.pad(sums.double().cumsum(2), (0, 0, 1, 0))


def _check_shapes(q: Tensor, k: Tensor, rule: ScoreRule, ranges: Tensor, free: Tensor, q_blocks: int) -> None:
    batch, heads, _, d_head = q.shape
    if k.shape[0] != batch or k.shape[3] != d_head or k.dtype != q.dtype or heads % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)} {q.dtype} and k {list(k.shape)} {k.dtype} must share batch, d_head and dtype, and "
            "query heads must be a multiple of key heads."
        )
    if tuple(ranges.shape[:2]) != (batch, q_blocks) or tuple(free.shape) != (batch, heads, q_blocks):
        raise ValueError(
            f"the ranges {list(ranges.shape[:2])} must be [batch, q_blocks] = {[batch, q_blocks]} and free "
            f"{list(free.shape)} must be [batch, head, q_blocks] = {[batch, heads, q_blocks]}."
        )
    if rule.key_mask is not None and tuple(rule.key_mask.shape) != (batch, k.shape[2]):
        raise ValueError(f"key_mask {list(rule.key_mask.shape)} must be [batch, key] = {[batch, k.shape[2]]}.")

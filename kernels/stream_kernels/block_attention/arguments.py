"""Checks the arguments of the block-attention kernels once and lays them out as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_kernels.launch import architecture, interpreting, require_triton
from stream_kernels.rule import ScoreRule


@dataclass(frozen=True)
class Call:
    """One call's tensors, checked; `dtype` is what the caller gave and gets back."""

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    gate: Tensor | None
    key_mask: Tensor | None
    sinks: Tensor | None
    rule: ScoreRule
    q_block: int
    k_block: int
    dtype: torch.dtype
    architecture: str

    @property
    def q_blocks(self) -> int:
        return self.indices.shape[2]

    @property
    def slots(self) -> int:
        return self.indices.shape[3]

    @property
    def k_blocks(self) -> int:
        return -(-self.k.shape[2] // self.k_block)

    def kernel_arguments(self) -> dict[str, Any]:
        """What every kernel takes, whatever its tiles."""
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            **strides("q", self.q),
            **strides("k", self.k),
            **strides("v", self.v),
            "gate_ptr": self.gate,
            "key_mask_ptr": self.key_mask,
            "heads": self.q.shape[1],
            "groups": self.q.shape[1] // self.k.shape[1],
            "q_blocks": self.q_blocks,
            "slots": self.slots,
            "query_len": self.q.shape[2],
            "key_len": self.k.shape[2],
            "offset": self.rule.offset,
            "window": self.rule.window or 0,
            "scale": float(self.rule.scale),
            "softcap": float(self.rule.softcap or 0.0),
            "HAS_GATE": self.gate is not None,
            "HAS_KEY_MASK": self.key_mask is not None,
            "HAS_SOFTCAP": self.rule.softcap is not None,
            "HAS_WINDOW": self.rule.window is not None,
        }


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": tensor.stride(i) for i, axis in enumerate("bht")}


def used_slots(indices: Int[Tensor, "batch head q_blocks k"]) -> Int[Tensor, "batch head q_blocks"]:
    """One more than the last slot in use: the kernels walk no further."""
    slot = torch.arange(1, indices.shape[-1] + 1, dtype=torch.int32, device=indices.device)
    return torch.where(indices >= 0, slot, 0).amax(-1)


def sum_parts(parts: Float[Tensor, "batch head q_blocks row_parts steps"], slots: int) -> Tensor:
    """[batch, head, q_blocks, slots] from what the tiles of one pair of blocks contributed, in a fixed order."""
    return parts.unflatten(-1, (slots, -1)).sum((3, 5))


def readable(tensor: Tensor) -> Tensor:
    """As the kernels read q, k, v and their gradients: any strides, but the head dimension contiguous.

    The interpreter's bfloat16 dot is silently wrong, so bfloat16 is upcast there.
    """
    if interpreting() and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    rule: ScoreRule,
    *,
    q_block: int,
    k_block: int,
    gate: Tensor | None,
) -> Call:
    """Raises ValueError for shapes that do not fit, TypeError for dtypes, RuntimeError where Triton cannot run."""
    _check_shapes(q, k, v, indices, rule, q_block, k_block, gate)
    optional = {"indices": indices, "gate": gate, "key_mask": rule.key_mask, "sinks": rule.sinks}
    for name, tensor in {"k": k, "v": v, **optional}.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}: move them to one device.")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, not {q.dtype}, {k.dtype} and {v.dtype}: convert them.")
    require_triton(q)
    return Call(
        q=readable(q.detach()),
        k=readable(k.detach()),
        v=readable(v.detach()),
        indices=indices.to(torch.int32).contiguous(),
        gate=None if gate is None else gate.detach().to(torch.float32).contiguous(),
        key_mask=None if rule.key_mask is None else rule.key_mask.to(torch.uint8).contiguous(),
        sinks=None if rule.sinks is None else rule.sinks.detach().to(torch.float32).contiguous(),
        rule=rule,
        q_block=q_block,
        k_block=k_block,
        dtype=q.dtype,
        architecture=architecture(q.device),
    )


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, rule: ScoreRule, q_block: int, k_block: int, gate: Tensor | None
) -> None:
    if q.ndim != 4 or k.ndim != 4 or indices.ndim != 4:
        raise ValueError(
            "q, k and v must be [batch, head, position, d_head] and indices [batch, head, q_blocks, k], "
            f"not {list(q.shape)}, {list(k.shape)}, {list(v.shape)} and {list(indices.shape)}."
        )
    batch, heads, query_len, d_head = q.shape
    kv_heads, key_len = k.shape[1], k.shape[2]
    if q_block < 1 or k_block < 1:
        raise ValueError(f"Block sizes must be positive, not q_block={q_block} and k_block={k_block}.")
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != d_head:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must have one shape and share batch {batch} and "
            f"d_head {d_head} with q."
        )
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key heads: heads must be a multiple of kv heads."
        )
    wanted = (batch, heads, -(-query_len // q_block))
    if tuple(indices.shape[:3]) != wanted:
        raise ValueError(
            f"indices {list(indices.shape)} must be [batch, head, q_blocks, k] = {[*wanted, 'k']} for "
            f"{query_len} queries in blocks of {q_block}."
        )
    if indices.shape[3] < 1:
        raise ValueError("indices must have at least one slot per query block; fill it with -1 to keep nothing.")
    if gate is not None and gate.shape != indices.shape:
        raise ValueError(f"gate {list(gate.shape)} must have the shape of indices, {list(indices.shape)}.")
    if rule.key_mask is not None and tuple(rule.key_mask.shape) != (batch, key_len):
        raise ValueError(f"key_mask {list(rule.key_mask.shape)} must be [batch, key] = {[batch, key_len]}.")
    if rule.sinks is not None and tuple(rule.sinks.shape) != (heads,):
        raise ValueError(f"sinks {list(rule.sinks.shape)} must be [head] = {[heads]}.")

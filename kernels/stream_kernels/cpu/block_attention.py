"""Block-sparse attention on the CPU: the C++ operator behind two plain functions. Formulas: README.md.

Reference: ``stream_kernels.block_attention.reference.block_attention_reference``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_kernels.cpu.library import define, require_cpu_operators
from stream_kernels.rule import ScoreRule

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor indices, int q_block, int k_block, float scale, int offset, int? window, "
    "float? softcap, Tensor? key_mask, Tensor? sinks, Tensor? gate"
)
define(f"block_attention_forward({_OPERANDS}) -> (Tensor, Tensor, Tensor)")
define(
    f"block_attention_backward({_OPERANDS}, Tensor logsumexp, Tensor out, Tensor grad_out) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def cpu_block_attention_forward(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    indices: Int[Tensor, "batch head q_blocks k"],
    rule: ScoreRule,
    *,
    q_block: int,
    k_block: int,
    gate: Float[Tensor, "batch head q_blocks k"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the kept blocks, as the reference defines it, in float32 or bfloat16.

    Returns ``out`` in q's dtype, ``logsumexp`` float32 [batch, head, query] and ``block_mass`` float32
    [batch, head, q_blocks, k]. Raises RuntimeError where the operator is not available, TypeError for another
    dtype, ValueError for shapes that do not fit or an index outside the key blocks.
    """
    _check(q, k, v, indices, rule, q_block, k_block, gate)
    return torch.ops.stream_lens_cpu.block_attention_forward(q, k, v, indices, q_block, k_block, *_fields(rule), gate)


def cpu_block_attention_backward(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    indices: Int[Tensor, "batch head q_blocks k"],
    rule: ScoreRule,
    logsumexp: Float[Tensor, "batch head query"],
    out: Float[Tensor, "batch head query d_head"],
    grad_out: Float[Tensor, "batch head query d_head"],
    *,
    q_block: int,
    k_block: int,
    gate: Float[Tensor, "batch head q_blocks k"] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``sum(out · grad_out)``: dq, dk, dv in their tensors' dtypes, dgate float32 [.., q_blocks, k].

    ``logsumexp`` and ``out`` are the forward's. dgate is given whether or not a gate was (a gate of ones), and is 0
    in empty slots. Raises as the forward does.
    """
    _check(q, k, v, indices, rule, q_block, k_block, gate)
    for name, x, shape in (
        ("logsumexp", logsumexp, q.shape[:3]),
        ("out", out, q.shape),
        ("grad_out", grad_out, q.shape),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; for q of shape {tuple(q.shape)} give {tuple(shape)}")
    return torch.ops.stream_lens_cpu.block_attention_backward(
        q, k, v, indices, q_block, k_block, *_fields(rule), gate, logsumexp, out, grad_out
    )


def _fields(rule: ScoreRule) -> tuple:
    return rule.scale, rule.offset, rule.window, rule.softcap, rule.key_mask, rule.sinks


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    rule: ScoreRule,
    q_block: int,
    k_block: int,
    gate: Tensor | None,
) -> None:
    require_cpu_operators()
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.device.type != "cpu":
            raise ValueError(f"{name} is on {x.device}; the C++ operator takes CPU tensors")
        if x.dtype not in (torch.float32, torch.bfloat16) or x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}; the C++ operator takes q, k and v all float32 or all bfloat16")
    if q_block < 1 or k_block < 1:
        raise ValueError(f"q_block {q_block} and k_block {k_block} must be at least 1")
    batch, heads, query_len, d_head = q.shape
    kv_heads, key_len = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != d_head or heads % kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: k and v share a shape, batch and "
            "d_head are q's, and q's heads are a multiple of k's"
        )
    blocks = (batch, heads, -(-query_len // q_block))
    if indices.shape[:3] != blocks or indices.ndim != 4 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices is {indices.dtype} of shape {tuple(indices.shape)}; give int32 or int64 of shape {(*blocks, 'k')}"
        )
    expected = {
        "gate": (gate, tuple(indices.shape)),
        "key_mask": (rule.key_mask, (batch, key_len)),
        "sinks": (rule.sinks, (heads,)),
    }
    for name, (given, shape) in expected.items():
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; give {shape}")


@torch.library.register_fake("stream_lens_cpu::block_attention_forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *rest: object) -> tuple[Tensor, ...]:
    logsumexp = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(q.shape), logsumexp, q.new_empty(indices.shape, dtype=torch.float32)


@torch.library.register_fake("stream_lens_cpu::block_attention_backward")
def _backward_fake(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *rest: object) -> tuple[Tensor, ...]:
    dgate = q.new_empty(indices.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dgate

"""Block-sparse attention, backward (definition: autograd through `reference.py`, formulas: `README.md`).

Two launches and no atomics, so equal inputs give equal gradients: `query_gradient.py` walks each query block's
kept slots, `key_gradient.py` walks, for each key block, the slots that keep it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_kernels.block_attention.arguments import prepare, readable
from stream_kernels.block_attention.inverted import invert
from stream_kernels.block_attention.key_gradient import key_gradient
from stream_kernels.block_attention.query_gradient import query_gradient
from stream_kernels.rule import ScoreRule


def block_attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `block_attention_forward`'s ``out``, given what it returned: ``dq, dk, dv, dgate``.

    dq, dk and dv have the inputs' dtypes; ``dgate`` is float32, 0 in empty slots, and None without a gate.
    The gradient to `rule.sinks` is the caller's: ``-sum(exp(sink - logsumexp) · delta)``, see `README.md`.
    Raises what `block_attention_forward` raises, and ValueError for shapes unlike the forward's.
    """
    call = prepare(q, k, v, indices, rule, q_block=q_block, k_block=k_block, gate=gate)
    shapes = {"out": (out, q.shape), "grad_out": (grad_out, q.shape), "logsumexp": (logsumexp, q.shape[:3])}
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} {list(tensor.shape)} must have the forward's shape {list(shape)}.")
    grad_out = readable(grad_out.detach().to(q.dtype))
    logsumexp = logsumexp.detach().to(torch.float32).contiguous()
    inverted = invert(call.indices, kv_heads=k.shape[1], k_blocks=call.k_blocks)
    dq, delta, dgate = query_gradient(call, readable(out.detach()), grad_out, logsumexp)
    dk, dv = key_gradient(call, inverted, grad_out, logsumexp, delta)
    return dq.to(call.dtype), dk.to(call.dtype), dv.to(call.dtype), dgate

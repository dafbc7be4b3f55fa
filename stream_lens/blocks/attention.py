"""block_sparse_attention: attention over a BlockMask, differentiable, on the fastest path that can run here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks.block_mask import BlockMask
from stream_lens.blocks.kernel_choice import Kernel, choose_kernel
from stream_lens.blocks.selection import check_shapes


class SparseAttention(NamedTuple):
    """What block-sparse attention gives.

    Attributes:
        out: [batch, head, query, d_head], like q.
        logsumexp: [batch, head, query], natural, sinks included; -inf for a row that sees no key (its `out` is 0).
        block_mass: [batch, head, q_blocks, k], aligned with `mask.indices`: probability summed over the block's rows
            and keys, before the gate. Divide by the rows of a query block for the mean share of a row.
    """

    out: Float[Tensor, "batch head query d_head"]
    logsumexp: Float[Tensor, "batch head query"]
    block_mass: Float[Tensor, "batch head q_blocks k"]


def block_sparse_attention(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    mask: BlockMask,
    rule: ScoreRule | None = None,
    gate: Float[Tensor, "batch head q_blocks k"] | None = None,
    *,
    kernel: Kernel = "auto",
) -> SparseAttention:
    """Softmax attention over the kept blocks only, renormalised over them.

    `out` is differentiable in q, k, v, gate and the rule's sinks; `logsumexp` and `block_mass` are not.

    Args:
        q, k, v: after rotary embedding and any norm; query head h uses key head h // (heads / kv_heads).
        mask: the blocks to keep; every row's own token must be in one for the row to see anything.
        rule: as for `select_blocks`; by default scale d_head ** -0.5, and the mask's offset and window.
        gate: multiplies each kept block's probabilities after the softmax (1 leaves them, 0 removes the block's
            contribution without renormalising).
        kernel: "auto", or a path to force: "triton" (CUDA, ROCm), "cpp" (CPU, float32 and bfloat16), "torch".

    Raises:
        ValueError: shapes, mask and rule do not fit together.
        RuntimeError: a forced kernel cannot run here; the message says why.
    """
    rule = rule or ScoreRule(q.shape[-1] ** -0.5, mask.offset, mask.window)
    check_operands(q, k, v, mask, rule)
    if v.dtype != k.dtype:
        raise ValueError(f"q, k and v must share one dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")
    if gate is not None and gate.shape != mask.indices.shape:
        raise ValueError(f"gate must have one value per slot, {list(mask.indices.shape)}; got {list(gate.shape)}.")
    path = choose_kernel(kernel, q)
    return SparseAttention(*_BlockAttention.apply(q, k, v, gate, rule.sinks, mask, rule, path))


def check_operands(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, rule: ScoreRule) -> None:
    """Raise ValueError unless all of these describe one attention."""
    check_shapes(q, k, rule)
    if v.shape[:3] != k.shape[:3] or v.shape[3] != k.shape[3]:
        raise ValueError(f"v {tuple(v.shape)} must have the shape of k {tuple(k.shape)}.")
    if mask.shape != (q.shape[0], q.shape[1], q.shape[2], k.shape[2]) or mask.offset != rule.offset:
        raise ValueError(
            f"the mask stands for a pattern of {list(mask.shape)} at offset {mask.offset}; q and k make "
            f"{[q.shape[0], q.shape[1], q.shape[2], k.shape[2]]} at offset {rule.offset}."
        )
    if mask.window != rule.window:
        raise ValueError(
            f"the mask has window {mask.window} and the rule window {rule.window}: they describe one layer, so give "
            "both the same."
        )


class _BlockAttention(torch.autograd.Function):
    """Forward and backward of whichever path was chosen; the gradient of the sinks is the same few lines for all."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        sinks: Tensor | None,
        mask: BlockMask,
        rule: ScoreRule,
        path: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = {"q_block": mask.q_block, "k_block": mask.k_block}
        out, logsumexp, mass = path.forward(q, k, v, mask.indices, rule, **sizes, gate=gate)
        ctx.save_for_backward(q, k, v, gate, sinks, mask.indices, logsumexp, out)
        ctx.rule, ctx.sizes, ctx.path = rule, sizes, path
        ctx.mark_non_differentiable(logsumexp, mass)
        return out, logsumexp, mass

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _logsumexp: Any, _mass: Any) -> tuple[Tensor | None, ...]:
        q, k, v, gate, sinks, indices, logsumexp, out = ctx.saved_tensors
        dq, dk, dv, dgate = ctx.path.backward(
            q, k, v, indices, ctx.rule, logsumexp, out, grad_out.contiguous(), **ctx.sizes, gate=gate
        )
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[4]:
            share = (sinks.to(logsumexp)[:, None] - logsumexp).exp()
            dsinks = -(share * (grad_out * out).sum(-1, dtype=logsumexp.dtype)).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, None if gate is None else dgate.to(gate.dtype), dsinks, None, None, None

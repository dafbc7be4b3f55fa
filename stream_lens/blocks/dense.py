"""Exact dense attention in bounded memory, with the block masses of a mask under the dense softmax."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stream_kernels.rule import ScoreRule
from stream_lens.blocks.attention import SparseAttention, check_operands
from stream_lens.blocks.block_mask import BlockMask, visible_keys
from stream_lens.blocks.branch_scores import computing_dtype
from stream_lens.blocks.search import CHUNK_BYTES


def dense_attention(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch v_head key d_head"],
    rule: ScoreRule,
    mask: BlockMask,
) -> SparseAttention:
    """Dense attention a few query blocks at a time: O(T²) time (O(T · window) with one), O(T) memory.

    `out` is differentiable in q, k, v and the rule's sinks; the backward pass makes each chunk's scores again.
    `block_mass` is the share that the mask's blocks hold of the *dense* pattern, so its sum over slots divided by the
    rows of the query block is the mass recall of the mask.

    q and k may have a wider dtype than v, as where a model makes its scores in float32; `out` is like v. They may also
    have been repeated for grouped heads where v was not.

    Raises:
        ValueError: as for `block_sparse_attention`.
    """
    if v.ndim == 4 and v.shape[1] and k.shape[1] % v.shape[1] == 0:
        v = v.repeat_interleave(k.shape[1] // v.shape[1], 1)
    check_operands(q, k, v, mask, rule)
    dtype = computing_dtype(q.dtype)
    bytes_per_block = q.shape[0] * q.shape[1] * mask.q_block * k.shape[2] * dtype.itemsize
    # Four chunks' worth: a step reads all of k and v, so steps of a single query block would be bound by that.
    step = max(1, 4 * CHUNK_BYTES // bytes_per_block) * mask.q_block
    parts = []
    for start in range(0, q.shape[2], step):
        rows, sinks = q[:, :, start : start + step], rule.sinks
        parts.append(checkpoint(_rows, rows, k, v, sinks, start, rule, mask, use_reentrant=False))
    out, logsumexp, mass = (torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))
    return SparseAttention(out.to(v.dtype), logsumexp, mass)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, start: int, rule: ScoreRule, mask: BlockMask
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows from `start` on (the first of a query block), over the key blocks that causality and window leave."""
    dtype, kv_heads = computing_dtype(q.dtype), k.shape[1]
    position = rule.offset + start + torch.arange(q.shape[2], device=q.device)
    oldest = 0 if rule.window is None else max(0, rule.offset + start - rule.window + 1)
    first = oldest // mask.k_block * mask.k_block
    stop = rule.offset + start + q.shape[2]
    k, v = (x[:, :, None, first:stop].to(dtype) for x in (k, v))
    q = rearrange(q, "b (g n) t d -> b g n t d", g=kv_heads).to(dtype) * rule.scale
    scores = q @ k.transpose(-1, -2)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    visible = visible_keys(position, stop, rule.window)[:, first:]
    if rule.key_mask is not None:
        visible = visible & rearrange(rule.key_mask.to(q.device)[:, first:stop], "b t -> b 1 1 1 t")
    scores = scores.masked_fill(~visible, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, rearrange(sinks.to(dtype), "(g n) -> 1 g n 1 1", g=kv_heads))
    pattern = (scores - total).exp().nan_to_num(0.0)  # -inf - -inf: a row that sees nothing
    out = rearrange(pattern @ v, "b g n t d -> b (g n) t d")
    pattern = rearrange(pattern.detach(), "b g n t j -> b (g n) t j")
    mass = _masses(pattern, start // mask.q_block, first // mask.k_block, mask)
    return out, rearrange(total[..., 0], "b g n t -> b (g n) t").detach(), mass


def _masses(
    pattern: Float[Tensor, "batch head rows keys"], query_block: int, key_block: int, mask: BlockMask
) -> Float[Tensor, "batch head q_blocks k"]:
    """Sums over the mask's blocks of a part of the pattern that begins at these blocks."""
    tail = (0, -pattern.shape[3] % mask.k_block, 0, -pattern.shape[2] % mask.q_block)
    padded = torch.nn.functional.pad(pattern, tail)
    blocks = rearrange(padded, "b h (i r) (n j) -> b h i n r j", r=mask.q_block, j=mask.k_block).sum((-1, -2))
    index = mask.indices[:, :, query_block : query_block + blocks.shape[2]] - key_block
    here = (index >= 0) & (index < blocks.shape[3])
    mass = blocks.gather(-1, index.clamp(0, blocks.shape[3] - 1).long())
    return torch.where(here, mass, 0.0)

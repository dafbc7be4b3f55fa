"""Block-sparse attention in plain torch: gather the kept blocks of a few query blocks, batched matmul, softmax.

Definition: `stream_kernels.block_attention.reference`. The working set of one step is bounded by `chunk_bytes`, so
memory is O(T) whatever the number of kept blocks. The backward pass recomputes probabilities from `logsumexp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks.branch_scores import computing_dtype


@dataclass(frozen=True)
class Blocks:
    """One attention's operands cut into blocks, zero-padded at ragged ends, in the computing dtype."""

    q: Float[Tensor, "batch head q_blocks q_block d_head"]
    k: Float[Tensor, "rows k_block d_head"]
    v: Float[Tensor, "rows k_block d_head"]
    base: Int[Tensor, "batch head 1 1"]
    """Row of `k` and `v` where each (batch, head)'s key blocks begin; heads of one group share it."""
    real: Bool[Tensor, "batch keys"]
    query_len: int


def forward(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    indices: Int[Tensor, "batch head q_blocks k"],
    rule: ScoreRule,
    *,
    q_block: int,
    k_block: int,
    gate: Float[Tensor, "batch head q_blocks k"] | None = None,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`out` (like q), `logsumexp` [batch, head, query] and `block_mass` [batch, head, q_blocks, k]."""
    blocks = _cut(q, k, v, rule, q_block, k_block)
    outs, sums, masses = [], [], []
    for part in _chunks(indices, blocks, chunk_bytes):
        index = indices[:, :, part]
        scores, values = _scores(blocks, index, part, rule, k_block)
        top = scores.amax(-1, keepdim=True)
        if rule.sinks is not None:
            top = torch.maximum(top, _sinks(rule, scores))
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = (scores - top).exp_()
        total = weights.sum(-1, keepdim=True)
        if rule.sinks is not None:
            total = total + (_sinks(rule, scores) - top).exp()
        weights = weights / total.clamp(min=torch.finfo(total.dtype).tiny)
        by_slot = rearrange(weights, "b h i r (n j) -> b h i r n j", j=k_block)
        masses.append(by_slot.sum((3, 5)))
        if gate is not None:
            gates = rearrange(gate[:, :, part], "b h i n -> b h i 1 n 1").to(weights.dtype)
            weights = rearrange(by_slot * gates, "b h i r n j -> b h i r (n j)")
        outs.append(weights @ values)
        sums.append((total.log() + top)[..., 0])
    query_len = q.shape[2]
    out = rearrange(torch.cat(outs, 2), "b h i r d -> b h (i r) d")[:, :, :query_len].to(q.dtype)
    logsumexp = rearrange(torch.cat(sums, 2), "b h i r -> b h (i r)")[:, :, :query_len]
    return out.contiguous(), logsumexp.contiguous(), torch.cat(masses, 2)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    rule: ScoreRule,
    logsumexp: Float[Tensor, "batch head query"],
    out: Tensor,
    grad_out: Tensor,
    *,
    q_block: int,
    k_block: int,
    gate: Tensor | None = None,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gate: ds = P · (gate · (dO·v) − dO·out), dgate = sum of P · (dO·v)."""
    blocks = _cut(q, k, v, rule, q_block, k_block)
    grad = _query_blocks(grad_out, q_block)
    delta = _query_blocks((grad_out * out).sum(-1, keepdim=True, dtype=blocks.q.dtype), q_block)
    lse = _query_blocks(logsumexp[..., None].to(blocks.q.dtype), q_block)
    dq, dgate = torch.zeros_like(blocks.q), torch.zeros(indices.shape, dtype=blocks.q.dtype, device=q.device)
    dk, dv = torch.zeros_like(blocks.k), torch.zeros_like(blocks.v)
    for part in _chunks(indices, blocks, chunk_bytes):
        index = indices[:, :, part]
        scores, values = _scores(blocks, index, part, rule, k_block)
        weights = (scores - lse[:, :, part]).exp().nan_to_num(0.0)
        dp = grad[:, :, part] @ values.transpose(-1, -2)
        by_slot = rearrange(weights * dp, "b h i r (n j) -> b h i r n j", j=k_block)
        dgate[:, :, part] = by_slot.sum((3, 5))
        gated = weights
        if gate is not None:
            gates = gate[:, :, part].to(dp.dtype).repeat_interleave(k_block, -1)[:, :, :, None]
            dp, gated = dp * gates, weights * gates
        ds = rule.scale * weights * (dp - delta[:, :, part])
        if rule.softcap is not None:
            ds = ds * (1 - (scores.masked_fill(scores == -torch.inf, 0.0) / rule.softcap).square())
        rows = _rows(blocks, index)
        keys = blocks.k.index_select(0, rows).view(*index.shape[:3], -1, q.shape[-1])
        dq[:, :, part] = ds @ keys
        spread = (len(rows), k_block, q.shape[-1])
        dk.index_add_(0, rows, (ds.transpose(-1, -2) @ blocks.q[:, :, part]).reshape(spread))
        dv.index_add_(0, rows, (gated.transpose(-1, -2) @ grad[:, :, part]).reshape(spread))

    def whole(rows: Tensor, like: Tensor) -> Tensor:
        batch, kv_heads, key_len, _ = like.shape
        return rearrange(rows, "(b g n) j d -> b g (n j) d", b=batch, g=kv_heads)[:, :, :key_len].to(like.dtype)

    dq = rearrange(dq, "b h i r d -> b h (i r) d")[:, :, : q.shape[2]].to(q.dtype)
    return dq, whole(dk, k), whole(dv, v), dgate


def _cut(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, q_block: int, k_block: int) -> Blocks:
    batch, kv_heads, key_len, _ = k.shape
    tail, dtype = -key_len % k_block, computing_dtype(q.dtype)
    k_blocks = (key_len + tail) // k_block
    real = torch.ones(batch, key_len, dtype=torch.bool, device=k.device)
    if rule.key_mask is not None:
        real = rule.key_mask.to(k.device)
    head = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // kv_heads)
    row = (torch.arange(batch, device=q.device)[:, None] * kv_heads + head) * k_blocks

    def rows(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 0, tail)) if tail else x
        return rearrange(x.to(dtype), "b g (n j) d -> (b g n) j d", j=k_block)

    return Blocks(
        _query_blocks(q, q_block).to(dtype),
        rows(k),
        rows(v),
        rearrange(row, "b h -> b h 1 1"),
        torch.nn.functional.pad(real, (0, tail)),
        q.shape[2],
    )


def _query_blocks(x: Tensor, q_block: int) -> Tensor:
    tail = -x.shape[2] % q_block
    x = torch.nn.functional.pad(x, (0, 0, 0, tail)) if tail else x
    return rearrange(x, "b h (i r) d -> b h i r d", r=q_block)


def _chunks(indices: Tensor, blocks: Blocks, chunk_bytes: int) -> Iterator[slice]:
    batch, heads, q_blocks, k = indices.shape
    _, k_block, d_head = blocks.k.shape
    step = max(1, chunk_bytes // (batch * heads * k * k_block * d_head * blocks.k.element_size()))
    return (slice(i, min(i + step, q_blocks)) for i in range(0, q_blocks, step))


def _rows(blocks: Blocks, index: Tensor) -> Int[Tensor, "rows"]:
    return (blocks.base + index.clamp(min=0)).flatten()


def _scores(
    blocks: Blocks, index: Int[Tensor, "batch head part k"], part: slice, rule: ScoreRule, k_block: int
) -> tuple[Float[Tensor, "batch head part q_block keys"], Float[Tensor, "batch head part keys d_head"]]:
    """Masked scores of the kept blocks' keys, and those keys' values."""
    rows, q = _rows(blocks, index), blocks.q[:, :, part]
    keys, values = (x.index_select(0, rows).view(*index.shape[:3], -1, q.shape[-1]) for x in (blocks.k, blocks.v))
    scores = (q * rule.scale) @ keys.transpose(-1, -2)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    q_block = q.shape[3]
    key = (index.clamp(min=0)[..., None] * k_block + torch.arange(k_block, device=q.device)).flatten(-2)[:, :, :, None]
    first = torch.arange(part.start, part.stop, device=q.device)[:, None] * q_block
    position = (rule.offset + first + torch.arange(q_block, device=q.device))[..., None]
    beyond = position >= rule.offset + blocks.query_len
    hidden = beyond | (key > position) | (index < 0).repeat_interleave(k_block, -1)[:, :, :, None]
    if rule.window is not None:
        hidden |= key <= position - rule.window
    if rule.key_mask is not None:
        hidden |= ~blocks.real[torch.arange(len(blocks.real), device=q.device)[:, None, None, None, None], key]
    return scores.masked_fill_(hidden, -torch.inf), values


def _sinks(rule: ScoreRule, scores: Tensor) -> Tensor:
    assert rule.sinks is not None
    return rearrange(rule.sinks.to(scores), "h -> 1 h 1 1 1")

"""What stands for a branch of key blocks, and how a query block's rows vote on it.

A *branch* is a range [start, stop) of key blocks. Its *representative* is a few keys, or one pooled key:

- "first", "centre", "last": all keys of that block of the branch. "strided": k_block keys spread evenly over it.
- "mean": the mean of the branch's real keys: one dot product however long the branch is.
- "mean_var": the same, plus half the variance of the branch's scores under a diagonal covariance: the second term of
  ``log mean exp(score) ≈ mean + variance / 2``.

For each row that gives a log-mass (log-mean-exp over the representative, times the number of keys in the branch) or a
maximum. The rows' *reduction* makes one number of them:

- "max": the largest score over rows and representative keys.
- "mass": the sum over rows of the softmax over candidates and forced blocks: the attention the branch would get.
- "peak": the largest such softmax share over rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stream_kernels.rule import ScoreRule


@dataclass(frozen=True)
class KeyTables:
    """Keys of one attention laid out by block, once per search.

    Attributes:
        blocks: [batch·kv_head·k_blocks, k_block, d_head], zero-padded at the end.
        real: bool [batch, k_blocks · k_block], False for padding and beyond the last key.
        sums: float64 prefix sums over blocks of real keys, [batch·kv_head·(k_blocks + 1), d_head].
        squares: the same of squared keys, only for "mean_var".
        counts: prefix sums of real keys per block, [batch, k_blocks + 1].
        k_blocks, k_block, kv_heads: sizes.
    """

    blocks: Float[Tensor, "rows k_block d_head"]
    real: Bool[Tensor, "batch keys"]
    sums: Float[Tensor, "rows d_head"] | None
    squares: Float[Tensor, "rows d_head"] | None
    counts: Int[Tensor, "batch blocks"]
    k_blocks: int
    k_block: int
    kv_heads: int


@dataclass(frozen=True)
class QueryRows:
    """Some rows of a run of query blocks.

    Attributes:
        q: [batch, head, q_blocks, rows, d_head], in the computing dtype.
        position: absolute position of each row, [q_blocks, rows].
        votes: bool [batch, q_blocks, rows]: False for rows beyond the end and for padding; None when all vote.
    """

    q: Float[Tensor, "batch head q_blocks rows d_head"]
    position: Int[Tensor, "q_blocks rows"]
    votes: Bool[Tensor, "batch q_blocks rows"] | None


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is scored in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def key_tables(k: Float[Tensor, "batch kv_head key d_head"], rule: ScoreRule, k_block: int, pooled: str) -> KeyTables:
    """Lay keys out by block; `pooled` ("mean", "mean_var" or "") says which prefix sums are needed."""
    batch, kv_heads, key_len, _ = k.shape
    k_blocks = -(-key_len // k_block)
    real = torch.ones(batch, key_len, dtype=torch.bool, device=k.device)
    if rule.key_mask is not None:
        real = rule.key_mask.to(k.device)
    tail = k_blocks * k_block - key_len
    real = torch.nn.functional.pad(real, (0, tail))
    blocks = torch.nn.functional.pad(k, (0, 0, 0, tail)).to(computing_dtype(k.dtype))
    counts = rearrange(real, "b (n j) -> b n j", j=k_block).sum(-1).cumsum(-1)

    def prefix(keys: Tensor) -> Tensor:
        if rule.key_mask is not None:
            keys = keys * rearrange(real, "b t -> b 1 t 1")
        sums = rearrange(keys, "b g (n j) d -> b g n j d", j=k_block).sum(3)
        sums = torch.nn.functional.pad(sums.double().cumsum(2), (0, 0, 1, 0))
        return rearrange(sums, "b g n d -> (b g n) d")

    return KeyTables(
        blocks=rearrange(blocks, "b g (n j) d -> (b g n) j d", j=k_block),
        real=real,
        sums=prefix(blocks) if pooled else None,
        squares=prefix(blocks.square()) if pooled == "mean_var" else None,
        counts=torch.nn.functional.pad(counts, (1, 0)),
        k_blocks=k_blocks,
        k_block=k_block,
        kv_heads=kv_heads,
    )


def first_rows(tables: KeyTables, heads: int, rows: int, device: torch.device) -> Int[Tensor, "batch head 1 1"]:
    """Where each (batch, head)'s part begins in a table of `rows` rows per key head; heads of one group share it."""
    batch = tables.counts.shape[0]
    group = torch.arange(heads, device=device) // (heads // tables.kv_heads)
    part = torch.arange(batch, device=device)[:, None] * tables.kv_heads + group
    return rearrange(part * rows, "b h -> b h 1 1")


def block_logits(
    rows: QueryRows,
    blocks: Int[Tensor, "batch head q_blocks n"],
    tables: KeyTables,
    rule: ScoreRule,
    key_of: Int[Tensor, "batch head q_blocks n j"] | None = None,
    *,
    past: bool = False,
) -> Float[Tensor, "batch head q_blocks rows n j"]:
    """Scores of the rows against the keys of whole blocks (or against the keys at `key_of`); -inf where not visible.

    `past` says that every key lies before every row, so that causality hides none.
    """
    batch, heads, q_blocks, _, d_head = rows.q.shape
    first = first_rows(tables, heads, tables.k_blocks, blocks.device)
    if key_of is None:
        safe = blocks.clamp(min=0)
        keys = tables.blocks.index_select(0, (first + safe).flatten())
        key_of = safe[..., None] * tables.k_block + torch.arange(tables.k_block, device=blocks.device)
    else:
        flat = rearrange(tables.blocks, "n j d -> (n j) d")
        keys = flat.index_select(0, (first[..., None] * tables.k_block + key_of).flatten())
    width = key_of.shape[-1]
    keys = keys.view(batch, heads, q_blocks, -1, d_head)
    scores = capped((rule.scale * rows.q) @ keys.transpose(-1, -2), rule)
    hidden = (blocks < 0)[..., None].expand_as(key_of)
    if rule.key_mask is not None:
        hidden = hidden | ~tables.real[torch.arange(batch, device=key_of.device)[:, None, None, None, None], key_of]
    hidden = rearrange(hidden, "b h i n j -> b h i 1 (n j)")
    key, position = rearrange(key_of, "b h i n j -> b h i 1 (n j)"), rows.position[..., None]
    if not past:
        hidden = hidden | (key > position)
    if rule.window is not None:
        hidden = hidden | (key <= position - rule.window)
    return rearrange(scores.masked_fill_(hidden, -torch.inf), "b h i r (n j) -> b h i r n j", j=width)


def capped(scores: Tensor, rule: ScoreRule) -> Tensor:
    """The soft-cap on scaled products, where the rule has one."""
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def representative_logits(
    rows: QueryRows,
    edges: Int[Tensor, "batch head q_blocks m 3"],
    tables: KeyTables,
    rule: ScoreRule,
    representative: str,
    reduce: str,
) -> Float[Tensor, "batch head q_blocks rows 2m"]:
    """Each row's maximum (reduce "max") or log-mass of the two children [a, b), [b, c) of every branch (a, b, c).

    -inf for empty and invisible children.
    """
    if representative in ("mean", "mean_var"):
        return _pooled_logits(rows, edges, tables, rule, representative, reduce)
    start, stop = edges[..., :2].flatten(-2), edges[..., 1:].flatten(-2)
    size = stop - start
    key_of = None
    block = {"first": start, "centre": start + size // 2, "last": stop - 1}.get(representative, start)
    block = torch.where(size <= 0, -1, block)
    if representative == "strided":
        spread = torch.arange(tables.k_block, device=start.device) * size.clamp(min=1)[..., None]
        key_of = start.clamp(min=0)[..., None] * tables.k_block + spread
    scores = block_logits(rows, block, tables, rule, key_of, past=True)
    if reduce == "max":
        return scores.amax(-1)
    seen = (scores > -torch.inf).sum(-1).clamp(min=1)
    return scores.logsumexp(-1) + torch.log(_real_keys(edges, tables)[:, :, :, None].to(scores.dtype) / seen)


def _pooled_logits(
    rows: QueryRows, edges: Tensor, tables: KeyTables, rule: ScoreRule, representative: str, reduce: str
) -> Tensor:
    count = _real_keys(edges, tables)
    at = (first_rows(tables, rows.q.shape[1], tables.k_blocks + 1, edges.device)[..., None] + edges).flatten()
    share = (1 / count.clamp(min=1).double())[..., None]

    def mean(sums: Tensor) -> Tensor:
        upto = sums.index_select(0, at).view(*edges.shape, -1)
        return (upto[..., 1:, :] - upto[..., :-1, :]).flatten(-3, -2).mul_(share)

    assert tables.sums is not None
    pooled, q = mean(tables.sums), rule.scale * rows.q
    scores = capped(q @ pooled.to(q.dtype).transpose(-1, -2), rule)
    if representative == "mean_var":
        assert tables.squares is not None
        # In float64: keys may lie far from zero.
        spread = mean(tables.squares).sub_(pooled.square_()).clamp_(min=0).to(q.dtype)
        scores = scores + 0.5 * q.square() @ spread.transpose(-1, -2)
    if reduce != "max":
        scores = scores + torch.log(count.to(scores.dtype))[:, :, :, None]
    hidden = rearrange(count <= 0, "b h i n -> b h i 1 n")
    if rule.window is not None:
        last_key = rearrange(edges[..., 1:].flatten(-2) * tables.k_block - 1, "b h i n -> b h i 1 n")
        hidden = hidden | (last_key <= rows.position[..., None] - rule.window)
    return scores.masked_fill_(hidden, -torch.inf)


def _real_keys(edges: Int[Tensor, "b h i m 3"], tables: KeyTables) -> Int[Tensor, "b h i 2m"]:
    """Real keys of the two children of every branch."""
    b = torch.arange(edges.shape[0], device=edges.device)[:, None, None, None, None]
    before = tables.counts[b, edges]
    return (before[..., 1:] - before[..., :-1]).flatten(-2)


def reduce_rows(
    logits: Float[Tensor, "batch head q_blocks rows n"],
    rows: QueryRows,
    reduce: str,
    forced_logsumexp: Float[Tensor, "batch head q_blocks rows"] | None,
) -> Float[Tensor, "batch head q_blocks n"]:
    """One score per branch from its rows' logits; -inf where no voting row sees the branch."""
    if rows.votes is not None:
        logits = logits.masked_fill(~rearrange(rows.votes, "b i r -> b 1 i r 1"), -torch.inf)
    most = logits.amax(3)
    if reduce == "max":
        return most
    top = logits.amax(-1, keepdim=True)
    if forced_logsumexp is not None:
        top = torch.maximum(top, forced_logsumexp[..., None])
    top = torch.where(top == -torch.inf, 0.0, top)
    share = (logits - top).exp_()
    total = share.sum(-1, keepdim=True)
    if forced_logsumexp is not None:
        total = total + (forced_logsumexp[..., None] - top).exp()
    share = share / torch.where(total == 0, 1.0, total)
    score = share.sum(3) if reduce == "mass" else share.amax(3)
    return score.masked_fill(most == -torch.inf, -torch.inf)

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
        sums: float64 prefix sums over blocks of real keys, [batch, kv_head, k_blocks + 1, d_head].
        squares: the same of squared keys, only for "mean_var".
        counts: prefix sums of real keys per block, [batch, k_blocks + 1].
        k_blocks, k_block, kv_heads: sizes.
    """

    blocks: Float[Tensor, "rows k_block d_head"]
    real: Bool[Tensor, "batch keys"]
    sums: Float[Tensor, "batch kv_head blocks d_head"] | None
    squares: Float[Tensor, "batch kv_head blocks d_head"] | None
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
        votes: bool [batch, q_blocks, rows]: False for rows beyond the end and for padding.
    """

    q: Float[Tensor, "batch head q_blocks rows d_head"]
    position: Int[Tensor, "q_blocks rows"]
    votes: Bool[Tensor, "batch q_blocks rows"]


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
        keys = keys * rearrange(real, "b t -> b 1 t 1")
        sums = rearrange(keys, "b g (n j) d -> b g n j d", j=k_block).sum(3)
        return torch.nn.functional.pad(sums.double().cumsum(2), (0, 0, 1, 0))

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


def block_logits(
    rows: QueryRows,
    blocks: Int[Tensor, "batch head q_blocks n"],
    tables: KeyTables,
    rule: ScoreRule,
    key_of: Int[Tensor, "batch head q_blocks n j"] | None = None,
) -> Float[Tensor, "batch head q_blocks rows n j"]:
    """Scores of the rows against the keys of whole blocks (or against the keys at `key_of`); -inf where not visible."""
    batch, heads, q_blocks, _, d_head = rows.q.shape
    group = torch.arange(heads, device=blocks.device) // (heads // tables.kv_heads)
    base = torch.arange(batch, device=blocks.device)[:, None] * tables.kv_heads + group
    base = rearrange(base * tables.k_blocks, "b h -> b h 1 1")
    if key_of is None:
        safe = blocks.clamp(min=0)
        keys = tables.blocks.index_select(0, (base + safe).flatten())
        key_of = safe[..., None] * tables.k_block + torch.arange(tables.k_block, device=blocks.device)
    else:
        flat = rearrange(tables.blocks, "n j d -> (n j) d")
        keys = flat.index_select(0, (base[..., None] * tables.k_block + key_of).flatten())
    width = key_of.shape[-1]
    keys = keys.view(batch, heads, q_blocks, -1, d_head)
    scores = (rule.scale * rows.q) @ keys.transpose(-1, -2)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    key = rearrange(key_of, "b h i n j -> b h i 1 (n j)")
    position = rows.position[..., None]
    hidden = (key > position) | rearrange(blocks < 0, "b h i n -> b h i 1 n").repeat_interleave(width, -1)
    if rule.window is not None:
        hidden |= key <= position - rule.window
    if rule.key_mask is not None:
        real = tables.real[torch.arange(batch, device=key.device)[:, None, None, None, None], key]
        hidden |= ~real
    scores = scores.masked_fill(hidden, -torch.inf)
    return rearrange(scores, "b h i r (n j) -> b h i r n j", j=width)


def representative_logits(
    rows: QueryRows,
    start: Int[Tensor, "batch head q_blocks n"],
    stop: Int[Tensor, "batch head q_blocks n"],
    tables: KeyTables,
    rule: ScoreRule,
    representative: str,
    reduce: str,
) -> Float[Tensor, "batch head q_blocks rows n"]:
    """Each row's maximum (reduce "max") or log-mass of each branch [start, stop); -inf for empty or invisible ones."""
    if representative in ("mean", "mean_var"):
        return _pooled_logits(rows, start, stop, tables, rule, representative, reduce)
    size = stop - start
    empty = size <= 0
    key_of = None
    block = {"first": start, "centre": start + size // 2, "last": stop - 1}.get(representative, start)
    block = torch.where(empty, -1, block)
    if representative == "strided":
        spread = torch.arange(tables.k_block, device=start.device) * size.clamp(min=1)[..., None]
        key_of = start.clamp(min=0)[..., None] * tables.k_block + spread
    scores = block_logits(rows, block, tables, rule, key_of)
    if reduce == "max":
        return scores.amax(-1)
    seen = (scores > -torch.inf).sum(-1).clamp(min=1)
    return scores.logsumexp(-1) + torch.log(_branch_keys(start, stop, tables)[:, :, :, None].to(scores.dtype) / seen)


def _pooled_logits(
    rows: QueryRows,
    start: Tensor,
    stop: Tensor,
    tables: KeyTables,
    rule: ScoreRule,
    representative: str,
    reduce: str,
) -> Tensor:
    count = _branch_keys(start, stop, tables)
    scale = rule.scale

    def mean(sums: Tensor) -> Tensor:
        return ((_taken(sums, stop) - _taken(sums, start)) / count.clamp(min=1)[..., None]).to(rows.q.dtype)

    assert tables.sums is not None
    pooled = mean(tables.sums)
    scores = (scale * rows.q) @ pooled.transpose(-1, -2)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if representative == "mean_var":
        assert tables.squares is not None
        spread = (mean(tables.squares) - pooled.square()).clamp(min=0)
        scores = scores + 0.5 * (scale * rows.q).square() @ spread.transpose(-1, -2)
    if reduce != "max":
        scores = scores + torch.log(count.to(scores.dtype))[:, :, :, None]
    hidden = rearrange(count <= 0, "b h i n -> b h i 1 n")
    if rule.window is not None:
        last_key = rearrange(stop * tables.k_block - 1, "b h i n -> b h i 1 n")
        hidden = hidden | (last_key <= rows.position[..., None] - rule.window)
    return scores.masked_fill(hidden, -torch.inf)


def _taken(sums: Float[Tensor, "b g n d"], blocks: Int[Tensor, "b h i c"]) -> Tensor:
    batch, kv_heads = sums.shape[:2]
    heads = blocks.shape[1]
    b = torch.arange(batch, device=sums.device)[:, None, None, None]
    g = (torch.arange(heads, device=sums.device) // (heads // kv_heads))[None, :, None, None]
    return sums[b, g, blocks]


def _branch_keys(start: Tensor, stop: Tensor, tables: KeyTables) -> Int[Tensor, "batch head q_blocks n"]:
    b = torch.arange(start.shape[0], device=start.device)[:, None, None, None]
    return torch.where(stop > start, tables.counts[b, stop.clamp(min=0)] - tables.counts[b, start.clamp(min=0)], 0)


def reduce_rows(
    logits: Float[Tensor, "batch head q_blocks rows n"],
    rows: QueryRows,
    reduce: str,
    forced_logsumexp: Float[Tensor, "batch head q_blocks rows"] | None,
) -> Float[Tensor, "batch head q_blocks n"]:
    """One score per branch from its rows' logits; -inf where no voting row sees the branch."""
    votes = rearrange(rows.votes, "b i r -> b 1 i r 1")
    logits = logits.masked_fill(~votes, -torch.inf)
    unseen = (logits == -torch.inf).all(3)
    if reduce == "max":
        return logits.amax(3)
    total = logits.logsumexp(-1)
    if forced_logsumexp is not None:
        total = torch.logaddexp(total, forced_logsumexp)
    total = torch.where(total == -torch.inf, 0.0, total)
    share = (logits - total[..., None]).exp()
    score = share.sum(3) if reduce == "mass" else share.amax(3)
    return score.masked_fill(unseen, -torch.inf)

"""The definition of the hierarchical search, one query block at a time, in float64.

Shares no code with the kernel. It scores a block's keys again and again, so it is for small shapes only.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from stream_kernels.rule import ScoreRule


def select_blocks_reference(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    *,
    first: Tensor,
    sink_stop: Tensor,
    local_start: Tensor,
    stop: Tensor,
    free: Tensor,
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
    """Arguments and result as those of `select_blocks_triton`."""
    kept = torch.full((*free.shape, slots), -1, dtype=torch.int32)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, free.shape)).tolist():
        row = torch.arange(i * q_block, min((i + 1) * q_block, q.shape[2]), query_stride)
        scores = scores_of_rows(q[b, h, row], k[b, h // (q.shape[1] // k.shape[1])], rule)
        position = rule.offset + row[:, None]
        key = torch.arange(k.shape[2])
        real = torch.ones_like(key, dtype=torch.bool) if rule.key_mask is None else rule.key_mask[b]
        recent = key > position - rule.window if rule.window is not None else torch.ones_like(key <= position)
        scores = scores.masked_fill(~(real & recent & (key <= position)), -torch.inf)
        pooled = {"q": q[b, h, row], "k": k[b, h // (q.shape[1] // k.shape[1])], "position": position, "rule": rule}
        votes = real[position[:, 0]]

        low, high = int(sink_stop[b, i]), int(local_start[b, i])
        always = [*range(int(first[b, i]), low), *range(high, int(stop[b, i]))]
        budget, length = int(free[b, h, i]), high - low
        branches = length if length <= budget else min(length, oversample * budget)
        live = [(low + length * j // branches, low + length * (j + 1) // branches) for j in range(branches)]
        forced = torch.stack([keys_of(scores, block, k_block).logsumexp(-1) for block in always], -1).logsumexp(-1)

        for _ in range(rounds):
            halves = [((a, (a + z) // 2), ((a + z) // 2, z)) if z - a > 1 else ((a, z),) for a, z in live]
            live = [child for pair in halves for child in pair]
            logits = [branch_logit(scores, a, z, k_block, real, pooled, representative, reduce) for a, z in live]
            live = best(live, voted(logits, forced, votes, reduce), branches)
        if oversample > 1 and length > budget:
            blocks = [keys_of(scores, a, k_block) for a, _ in live]
            logits = [x.amax(-1) if rank == "max" else x.logsumexp(-1) for x in blocks]
            live = best(live, voted(logits, forced, votes, rank), budget)
        row_of_mask = sorted(always + [a for a, _ in live])[:slots]
        kept[b, h, i, : len(row_of_mask)] = torch.tensor(row_of_mask, dtype=torch.int32)
    return kept


def scores_of_rows(q: Tensor, k: Tensor, rule: ScoreRule) -> Tensor:
    scores = rule.scale * q.double() @ k.double().T
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def keys_of(scores: Tensor, block: int, k_block: int) -> Tensor:
    return scores[:, block * k_block : (block + 1) * k_block]


def branch_logit(
    scores: Tensor, a: int, z: int, k_block: int, real: Tensor, pooled: dict, representative: str, reduce: str
) -> Tensor:
    """[rows]: the maximum or log-mass of the branch [a, z) as its representative shows it."""
    there = real[a * k_block : z * k_block]
    n = there.sum()
    if representative in ("mean", "mean_var"):
        keys, window = pooled["k"].double()[a * k_block : z * k_block][there], pooled["rule"].window
        mean = keys.sum(0) / n.clamp(min=1)
        logit = scores_of_rows(pooled["q"], mean[None], pooled["rule"])[:, 0]
        if representative == "mean_var":
            variance = (keys - mean).square().sum(0) / n.clamp(min=1)
            logit = logit + 0.5 * (pooled["rule"].scale * pooled["q"].double()).square() @ variance
        gone = n == 0 if window is None else (n == 0) | (z * k_block - 1 <= pooled["position"][:, 0] - window)
        logit = torch.where(gone, -torch.inf, logit)
        return logit if reduce == "max" else logit + n.log()
    if representative == "strided":
        shown = scores[:, a * k_block + torch.arange(k_block) * (z - a)]
    else:
        block = {"first": a, "centre": a + (z - a) // 2, "last": z - 1}[representative]
        shown = keys_of(scores, block, k_block)
    if reduce == "max":
        return shown.amax(-1)
    return shown.logsumexp(-1) + (n / (shown > -torch.inf).sum(-1).clamp(min=1)).log()


def voted(logits: list[Tensor], forced: Tensor, votes: Tensor, reduce: str) -> list[float]:
    """One score per branch: the rows' maximum, or what they give it in a softmax over branches and forced blocks."""
    if not logits:
        return []
    table = torch.stack(logits, -1)
    unseen = (table[votes] == -torch.inf).all(0)
    if reduce != "max":
        table = torch.cat([table, forced[:, None]], -1).softmax(-1)[:, :-1].nan_to_num(0.0)
    table = table[votes]
    if len(table) == 0:
        return [-torch.inf] * len(logits)
    score = table.sum(0) if reduce == "mass" else table.amax(0)
    return score.masked_fill(unseen, -torch.inf).tolist()


def best(live: list, score: list[float], most: int) -> list:
    """The `most` best that some row sees, in their old order; ties go to the earlier one."""
    order = sorted(range(len(live)), key=lambda j: (-score[j], j))
    return [live[j] for j in sorted(order[:most]) if score[j] > -torch.inf]

"""The probabilities of single tokens inside the kept blocks, a few query blocks at a time: O(T · k), never T × T."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.pattern_data import PatternData, require_scores
from stream_lens.backend.scores import Scores
from stream_lens.blocks import BlockMask
from stream_lens.blocks.branch_scores import computing_dtype

# Scores and gathered keys of one step. Ten times more is no faster on a CPU, and small beside one layer's queries.
_CHUNK_BYTES = 16 << 20


def kept_probabilities(
    pattern: SparsePattern, *, of_dense: bool = False
) -> Iterator[tuple[int, Float[Tensor, "head part q_block k k_block"]]]:
    """The first query block of each part, and its probabilities, the gate applied; 0 in empty slots and hidden keys.

    Args:
        pattern: of a batch of 1.
        of_dense: probabilities under the softmax over all keys instead of the kept ones, which takes O(T²) time.

    Raises:
        NoScoresError: the pattern was cached without its queries and keys.
    """
    data = pattern.data_
    sources = require_scores(data, "exact segment sums")
    mask = data.mask
    step = _step(mask, sources[0], of_dense)
    for first in range(0, mask.q_blocks, step):
        part = slice(first, min(first + step, mask.q_blocks))
        total = sum(_part(data, number, scores, part, of_dense) for number, scores in enumerate(sources))
        assert isinstance(total, Tensor)
        if data.gate is not None:
            total = total * data.gate[0, :, part, None, :, None].to(total.dtype)
        yield first, total


def _step(mask: BlockMask, scores: Scores, of_dense: bool) -> int:
    heads, d_head = mask.shape[1], scores.q.shape[-1]
    kept = mask.k * mask.k_block * (mask.q_block + d_head)
    everything = mask.q_block * mask.kv_len if of_dense else 0
    return max(1, _CHUNK_BYTES // (heads * (kept + everything) * computing_dtype(scores.q.dtype).itemsize))


def _part(data: PatternData, number: int, scores: Scores, part: slice, of_dense: bool) -> Tensor:
    mask, rule = data.mask, scores.rule
    (batch,), heads, _ = data.cell_rows
    index = mask.indices[0, :, part]
    if data.source_of is not None:
        index = torch.where(data.source_of[0, :, part, None] == number, index, -1)
    q = _queries(scores, mask, batch, heads, part)
    kv_heads = torch.tensor(heads, device=index.device) // (scores.q.shape[1] // scores.k.shape[1])
    key = index.clamp(min=0)[..., None] * mask.k_block + torch.arange(mask.k_block, device=index.device)
    gathered = scores.k[batch][kv_heads[:, None, None, None], key.clamp(max=mask.kv_len - 1)].to(q.dtype)
    logits = _capped(torch.einsum("h n r d, h n k j d -> h n r k j", q, gathered), rule.softcap)
    row = torch.arange(part.start * mask.q_block, part.stop * mask.q_block, device=index.device)
    row = row.view(-1, mask.q_block)
    hidden = _hidden(scores, mask, batch, row[None, :, :, None, None], key[:, :, None])
    logits = logits.masked_fill(hidden | (index < 0)[:, :, None, :, None], -torch.inf)
    total = logits.flatten(-2).logsumexp(-1)
    if of_dense:
        total = _dense_logsumexp(scores, mask, batch, kv_heads, q, row)
    if rule.sinks is not None:
        total = torch.logaddexp(total, rule.sinks[heads].to(total)[:, None, None])
    return (logits - total[..., None, None]).exp().nan_to_num(0.0)


def _queries(
    scores: Scores, mask: BlockMask, batch: int, heads: list[int], part: slice
) -> Float[Tensor, "head part q_block d_head"]:
    """Scaled, zero-padded at the ragged end."""
    skip = mask.offset - scores.rule.offset
    start, stop = part.start * mask.q_block, min(part.stop * mask.q_block, mask.q_len)
    q = scores.q[batch][heads, skip + start : skip + stop].to(computing_dtype(scores.q.dtype)) * scores.rule.scale
    q = torch.nn.functional.pad(q, (0, 0, 0, (part.stop - part.start) * mask.q_block - (stop - start)))
    return q.view(len(heads), -1, mask.q_block, q.shape[-1])


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _hidden(scores: Scores, mask: BlockMask, batch: int, row: Tensor, key: Tensor) -> Bool[Tensor, "..."]:
    """Which (row, key) pairs causality, the window, padding and the ragged ends hide."""
    position = mask.offset + row
    hidden = (key > position) | (row >= mask.q_len) | (key >= mask.kv_len)
    if mask.window is not None:
        hidden = hidden | (key <= position - mask.window)
    if scores.rule.key_mask is not None:
        real = scores.rule.key_mask[batch].to(key.device)
        hidden = hidden | ~real[key.clamp(max=mask.kv_len - 1)]
    return hidden


def _dense_logsumexp(
    scores: Scores, mask: BlockMask, batch: int, kv_heads: Tensor, q: Tensor, row: Tensor
) -> Float[Tensor, "head part q_block"]:
    key = torch.arange(mask.kv_len, device=q.device)
    hidden = _hidden(scores, mask, batch, row[..., None], key)
    sums = []
    for head, kv_head in enumerate(kv_heads.tolist()):
        keys = scores.k[batch, kv_head].to(q.dtype)
        sums.append(_capped(q[head] @ keys.T, scores.rule.softcap).masked_fill(hidden, -torch.inf).logsumexp(-1))
    return torch.stack(sums)


def holds_scores(pattern: SparsePattern) -> bool:
    """Whether the pattern kept the queries and keys that exact sums need."""
    return all(scores is not None for scores in pattern.data_.sources)

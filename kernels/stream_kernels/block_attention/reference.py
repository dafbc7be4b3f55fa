"""The definition of block-sparse attention, in a dozen obvious lines of float64.

Shares no code with the kernels; makes the whole score matrix, so it is for small shapes only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_kernels.rule import ScoreRule


def visible_reference(rule: ScoreRule, batch: int, query_len: int, key_len: int) -> Tensor:
    """Bool [batch, query, key]: which keys each row may see, before any block is dropped."""
    row = rule.offset + torch.arange(query_len)[:, None]
    key = torch.arange(key_len)[None, :]
    visible = key <= row
    if rule.window is not None:
        visible &= key > row - rule.window
    visible = visible.expand(batch, -1, -1)
    return visible if rule.key_mask is None else visible & rule.key_mask.cpu()[:, None, :]


def scores_reference(q: Tensor, k: Tensor, rule: ScoreRule) -> Tensor:
    """Float64 [batch, head, query, key]: scaled and soft-capped scores, nothing masked yet."""
    groups = q.shape[1] // k.shape[1]
    scores = rule.scale * q.double().cpu() @ k.double().cpu().repeat_interleave(groups, 1).transpose(-1, -2)
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def block_attention_reference(
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
    """Attention over the kept blocks: ``out``, ``logsumexp``, ``block_mass``, all float64 on the CPU.

    ``P = softmax(scores of visible keys in kept blocks, and the head's sink)``;
    ``out = sum over keys of gate · P · v``: the gate multiplies probabilities after the softmax.
    ``logsumexp`` [batch, head, query] is natural, includes the sink, and is -inf for a row without keys (its
    ``out`` is 0). ``block_mass`` [batch, head, q_blocks, k] sums P (before the gate) over the block's rows
    and keys; 0 in empty slots. ``indices`` slots of -1 are empty, wherever they stand; no block twice in a row.
    """
    batch, heads, query_len, _ = q.shape
    key_len, groups = k.shape[2], q.shape[1] // k.shape[1]
    scores = scores_reference(q, k, rule)
    visible = visible_reference(rule, batch, query_len, key_len)[:, None]
    gates = torch.ones(indices.shape, dtype=torch.float64) if gate is None else gate.double().cpu()

    slot_of_key = torch.full((batch, heads, query_len, key_len), -1)
    for b, h, i, slot in torch.cartesian_prod(*map(torch.arange, indices.shape)).tolist():
        block = int(indices[b, h, i, slot])
        if block >= 0:
            slot_of_key[b, h, i * q_block : (i + 1) * q_block, block * k_block : (block + 1) * k_block] = slot
    scores = scores.masked_fill(~visible | (slot_of_key < 0), -torch.inf)

    sinks = torch.full((heads,), -torch.inf) if rule.sinks is None else rule.sinks
    with_sink = torch.cat([scores, sinks.double().cpu()[None, :, None, None].expand(batch, -1, query_len, 1)], -1)
    logsumexp = with_sink.logsumexp(-1)
    pattern = (scores - logsumexp[..., None]).exp().nan_to_num(0.0)  # -inf - -inf: a row that sees nothing

    block_mass = torch.zeros(indices.shape, dtype=torch.float64)
    gate_of_key = torch.zeros_like(pattern)
    for b, h, i, slot in torch.cartesian_prod(*map(torch.arange, indices.shape)).tolist():
        here = slot_of_key[b, h, i * q_block : (i + 1) * q_block] == slot
        block_mass[b, h, i, slot] = pattern[b, h, i * q_block : (i + 1) * q_block][here].sum()
        gate_of_key[b, h, i * q_block : (i + 1) * q_block][here] = gates[b, h, i, slot]
    out = (gate_of_key * pattern) @ v.double().cpu().repeat_interleave(groups, 1)
    return out, logsumexp, block_mass

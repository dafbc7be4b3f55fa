"""Scores: what a block mask is turned into probabilities with. One run's queries and keys of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import BlockMask
from stream_lens.blocks.branch_scores import computing_dtype


@dataclass(frozen=True, eq=False)
class Scores:
    """Queries, keys and score rule of one layer in one run: O(T · d_head) for each head, never T × T."""

    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"]
    rule: ScoreRule

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.k.nbytes

    def detach(self) -> Scores:
        sinks = None if self.rule.sinks is None else self.rule.sinks.detach()
        return Scores(self.q.detach(), self.k.detach(), replace(self.rule, sinks=sinks))

    def to(self, device: torch.device | str) -> Scores:
        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        rule = replace(self.rule, key_mask=moved(self.rule.key_mask), sinks=moved(self.rule.sinks))
        return Scores(self.q.to(device), self.k.to(device), rule)

    def of(self, batch: list[int], heads: list[int]) -> Scores:
        """Of some batch rows and heads. Unless they are all, in order, every head gets keys of its own."""
        if batch == list(range(self.q.shape[0])) and heads == list(range(self.q.shape[1])):
            return self
        groups = self.q.shape[1] // self.k.shape[1]
        rule = self.rule
        sinks = None if rule.sinks is None else rule.sinks[heads]
        key_mask = None if rule.key_mask is None else rule.key_mask[batch]
        return Scores(
            self.q[batch][:, heads],
            self.k[batch][:, [head // groups for head in heads]],
            replace(rule, sinks=sinks, key_mask=key_mask),
        )

    def rows_of(self, mask: BlockMask) -> Scores:
        """Of the queries that `mask` covers, all keys."""
        start = mask.offset - self.rule.offset
        if (start, mask.q_len) == (0, self.q.shape[2]):
            return self
        return Scores(self.q[:, :, start : start + mask.q_len], self.k, replace(self.rule, offset=mask.offset))

    def probabilities(self, mask: BlockMask, rows: slice) -> Float[Tensor, "batch head rows key"]:
        """Softmax over the mask's kept keys for some of its rows; 0 elsewhere. The queries are those of the mask."""
        index = torch.arange(*rows.indices(mask.q_len), device=self.q.device)
        groups = self.q.shape[1] // self.k.shape[1]
        dtype = computing_dtype(self.q.dtype)
        q = self.q[:, :, index].to(dtype)
        scores = (self.rule.scale * q) @ self.k.to(dtype).repeat_interleave(groups, 1).transpose(-1, -2)
        if self.rule.softcap is not None:
            scores = self.rule.softcap * torch.tanh(scores / self.rule.softcap)
        visible = mask.to_dense(rows=rows)
        if self.rule.key_mask is not None:
            visible = visible & self.rule.key_mask.to(visible.device)[:, None, None, :]
        scores = scores.masked_fill(~visible, -torch.inf)
        if self.rule.sinks is not None:
            sink = self.rule.sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        return scores.softmax(-1).nan_to_num(0.0)[..., : mask.kv_len]

"""PatternData: everything a SparsePattern is apart from being a tensor, and what can be computed from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.backend.pattern_index import PatternIndex, block_span
from stream_lens.backend.scores import Scores
from stream_lens.blocks import BlockMask, block_sparse_attention
from stream_lens.blocks.block_mask import trimmed


class NoScoresError(RuntimeError):
    """A pattern was cached without the queries and keys that an operation needs."""


@dataclass(eq=False)
class MassCell:
    """Block masses of one run's mask. Filled by the kernel when the layer runs, shared by cached copies."""

    mask: BlockMask
    value: Float[Tensor, "batch head q_blocks k"] | None = None
    followers: list[MassCell] = field(default_factory=list)
    """Cells of copies on other devices, made before the masses were known."""

    def fill(self, value: Tensor) -> None:
        self.value = value.detach()
        for cell in self.followers:
            cell.fill(value.to(cell.mask.indices.device))


@dataclass(frozen=True, eq=False)
class PatternData:
    """Everything a SparsePattern is, apart from being a tensor. Edits make a new one; tensors are never changed.

    Attributes:
        mask: kept blocks of the batch rows, heads and query blocks that the pattern covers.
        gate: factor on each kept block's probabilities, None for all ones.
        cell: block masses of the unedited pattern.
        cell_rows: where this pattern lies in the cell: batch rows, heads, first query block.
        sources: scores to make probabilities with; None where they were not kept.
        source_of: [batch, head, q_blocks] index into `sources`, None for all 0.
        present: which of the four axes the pattern still has.
        dtype: of the dense pattern it stands for.
        edited: whether it differs from what the layer made.
        first_keys: first real key of each of the cell's batch rows, None where nothing is padded: without scores it is
            all that tells padding on the left.
    """

    mask: BlockMask
    gate: Float[Tensor, "batch head q_blocks k"] | None
    cell: MassCell
    cell_rows: tuple[list[int], list[int], int]
    sources: tuple[Scores | None, ...]
    source_of: Int[Tensor, "batch head q_blocks"] | None = None
    present: tuple[int, ...] = (0, 1, 2, 3)
    dtype: torch.dtype = torch.float32
    edited: bool = False
    first_keys: tuple[int, ...] | None = None
    layer: int | None = None
    run: object = field(default=None, repr=False)
    """Identity of the forward pass that made it, None once cached."""


def masked(data: PatternData, mask: BlockMask, **changes: Any) -> PatternData:
    """The pattern with other blocks; the running layer will fill in their masses."""
    return replace(data, mask=mask, cell=MassCell(mask), edited=True, **changes)


def gate_of(data: PatternData) -> Float[Tensor, "batch head q_blocks k"]:
    """The gate, ones where there is none."""
    indices = data.mask.indices
    return torch.ones(indices.shape, device=indices.device) if data.gate is None else data.gate


def padded_left(data: PatternData) -> list[bool]:
    """Whether each batch row of the pattern begins with padding."""
    rows = data.cell_rows[0]
    return [False] * len(rows) if data.first_keys is None else [data.first_keys[row] > 0 for row in rows]


def is_whole(data: PatternData) -> bool:
    """Whether it covers all that its cell does, in order."""
    return data.cell.mask is data.mask and data.cell_rows == whole_rows(data.mask)


def whole_rows(mask: BlockMask) -> tuple[list[int], list[int], int]:
    """Where a pattern that covers all of `mask` lies in its cell."""
    return list(range(mask.shape[0])), list(range(mask.shape[1])), 0


def cached_copy(data: PatternData, keep_scores: bool) -> PatternData:
    """The data alone: what `detach` gives, for caches."""
    sources = tuple(None if scores is None or not keep_scores else scores.detach() for scores in data.sources)
    gate = None if data.gate is None else data.gate.detach()
    return replace(data, gate=gate, sources=sources, run=None)


def moved(data: PatternData, device: torch.device | str) -> PatternData:
    """On another device, where masses still to come from the running layer will arrive too."""
    cell = MassCell(data.cell.mask.to(device))
    data.cell.followers.append(cell)
    if data.cell.value is not None:
        cell.fill(data.cell.value.to(device))
    return replace(
        data,
        mask=data.mask.to(device),
        gate=None if data.gate is None else data.gate.to(device),
        cell=cell,
        sources=tuple(None if scores is None else scores.to(device) for scores in data.sources),
        source_of=None if data.source_of is None else data.source_of.to(device),
    )


def require_scores(data: PatternData, what: str) -> tuple[Scores, ...]:
    """The pattern's scores, or a NoScoresError that says how to have them."""
    if any(scores is None for scores in data.sources):
        raise NoScoresError(
            f"{what} needs the queries and keys of the run that made this pattern, and it was cached without them: "
            "run with stream(…, keep_scores=True). Without them pattern.mask and pattern.block_mass can be read, and "
            "other.with_mask(pattern.mask) applies its blocks to another run."
        )
    return tuple(scores for scores in data.sources if scores is not None)


def for_each_source(data: PatternData, run: Callable[[Scores, BlockMask], Any]) -> list[Any]:
    """`run(scores, mask)` for every source cut to the pattern, with the mask's rows of other sources emptied."""
    batch, heads, _ = data.cell_rows
    results = []
    for number, scores in enumerate(data.sources):
        mask = data.mask
        if data.source_of is not None:
            own = data.source_of == number
            if not bool(own.any()):
                continue
            mask = replace(mask, indices=torch.where(own[..., None], mask.indices, -1))
        if scores is None:
            require_scores(data, "running this pattern")
        assert scores is not None
        results.append(run(scores.of(batch, heads).rows_of(mask), mask))
    return results


def block_mass(data: PatternData) -> Tensor:
    batch, heads, first = data.cell_rows
    if data.cell.value is not None:
        indices = data.cell.mask.indices[batch][:, heads, first : first + data.mask.q_blocks]
        if torch.equal(indices, data.mask.indices):
            return data.cell.value[batch][:, heads, first : first + data.mask.q_blocks]
    require_scores(data, "block_mass of an edited or unfinished pattern")

    def mass(scores: Scores, mask: BlockMask) -> Tensor:
        return block_sparse_attention(scores.q, scores.k, scores.k, mask, scores.rule).block_mass

    with torch.no_grad():
        return torch.stack(for_each_source(data, mass)).sum(0)


def probabilities(data: PatternData, rows: slice) -> Tensor:
    require_scores(data, "to_dense")
    total = torch.stack(for_each_source(data, lambda scores, mask: scores.probabilities(mask, rows))).sum(0)
    if data.gate is None:
        return total
    row = torch.arange(*rows.indices(data.mask.q_len), device=total.device)
    blocks = data.mask.indices[:, :, row // data.mask.q_block].long()
    factor = torch.ones(*total.shape[:3], data.mask.k_blocks + 1, device=total.device, dtype=total.dtype)
    gates = data.gate[:, :, row // data.mask.q_block].to(total.dtype)
    factor = factor.scatter(-1, torch.where(blocks < 0, data.mask.k_blocks, blocks), gates)
    return total * factor[..., :-1].repeat_interleave(data.mask.k_block, -1)[..., : data.mask.kv_len]


def row_slice(data: PatternData, where: PatternIndex) -> PatternData:
    mask = data.mask
    if where.rows[0] % mask.q_block == 0 and (where.rows[1] % mask.q_block == 0 or where.rows[1] == mask.q_len):
        return sliced(data, where.batch, where.heads, block_span("query", where.rows, mask.q_len, mask.q_block))
    first, last = where.rows[0] // mask.q_block, -(-where.rows[1] // mask.q_block)
    covering = sliced(data, where.batch, where.heads, slice(first, last))
    return _single_rows(covering, where.rows[0] - first * mask.q_block, where.rows[1] - where.rows[0])


def sliced(data: PatternData, batch: list[int], heads: list[int], q_blocks: slice) -> PatternData:
    cell_batch, cell_heads, first = data.cell_rows

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[batch][:, heads, q_blocks]

    mask = data.mask.select(q_blocks=q_blocks)
    indices = data.mask.indices[batch][:, heads, q_blocks]
    return replace(
        data,
        mask=replace(mask, indices=indices),
        gate=cut(data.gate),
        source_of=cut(data.source_of),
        cell_rows=([cell_batch[i] for i in batch], [cell_heads[i] for i in heads], first + q_blocks.start),
    )


def _single_rows(data: PatternData, skip: int, count: int) -> PatternData:
    """Some rows inside query blocks, as query blocks of one row each; masses are then computed from the scores."""
    row = skip + torch.arange(count, device=data.mask.indices.device)
    block = row // data.mask.q_block
    mask = replace(
        data.mask,
        indices=trimmed(data.mask.indices[:, :, block]) if count else data.mask.indices[:, :, :0],
        q_block=1,
        q_len=count,
        offset=data.mask.offset + skip,
    )
    gate = None if data.gate is None else data.gate[:, :, block, : mask.k]
    source_of = None if data.source_of is None else data.source_of[:, :, block]
    empty = MassCell(mask)
    return replace(data, mask=mask, gate=gate, source_of=source_of, cell=empty, cell_rows=(*data.cell_rows[:2], 0))

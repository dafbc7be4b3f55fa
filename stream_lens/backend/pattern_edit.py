"""Edits of a SparsePattern: which slots an edit means, and assignment of numbers and of other patterns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.pattern_data import PatternData, gate_of, masked
from stream_lens.backend.pattern_index import PatternIndex, PatternIndexError, block_span, parse_index
from stream_lens.backend.scores import Scores
from stream_lens.blocks import BlockMask


def slots(
    data: PatternData, blocks: BlockMask | Tensor | None, where: dict[str, Any]
) -> Bool[Tensor, "batch head q_blocks k"]:
    """True for the kept slots that `blocks` and `where` both name."""
    unknown = set(where) - {"batch", "heads", "rows", "keys"}
    if unknown:
        raise TypeError(f"unknown {', '.join(sorted(unknown))}: an edit is restricted by batch, heads, rows and keys.")
    mask = data.mask
    whole = slice(None)
    index = parse_index(
        tuple(where.get(name, whole) for name in ("batch", "heads", "rows", "keys")),
        mask.shape,
        (0, 1, 2, 3),
        crossed=True,
    )
    chosen = _slots_at(data, index)
    if isinstance(blocks, BlockMask):
        if (blocks.shape, blocks.q_block, blocks.k_block) != (mask.shape, mask.q_block, mask.k_block):
            raise ValueError(f"the blocks must cover the same tokens as {mask!r}; got {blocks!r}.")
        chosen = chosen & blocks.contains(mask.indices)
    elif blocks is not None:
        if blocks.shape != mask.indices.shape or blocks.dtype != torch.bool:
            raise ValueError(
                f"blocks must be a BlockMask or bool of shape {list(mask.indices.shape)}; "
                f"got {blocks.dtype} of shape {list(blocks.shape)}."
            )
        chosen = chosen & blocks
    return chosen


def _slots_at(data: PatternData, index: PatternIndex) -> Bool[Tensor, "batch head q_blocks k"]:
    mask = data.mask
    rows = block_span("query", index.rows, mask.q_len, mask.q_block, remedy="name whole query blocks")
    keys = block_span("key", index.keys, mask.kv_len, mask.k_block, remedy="name whole key blocks")
    device = mask.indices.device
    here = torch.zeros(mask.indices.shape[:3], dtype=torch.bool, device=device)
    batch = torch.tensor(index.batch, device=device)[:, None, None]
    heads = torch.tensor(index.heads, device=device)[None, :, None]
    here[batch, heads, torch.arange(rows.start, rows.stop, device=device)] = True
    return here[..., None] & mask.kept & (mask.indices >= keys.start) & (mask.indices < keys.stop)


def assigned(data: PatternData, index: Any, value: Any) -> PatternData:
    """The pattern after ``pattern[index] = value``: value is 0, or a SparsePattern of the part's shape."""
    where = parse_index(index, data.mask.shape, data.present)
    if isinstance(value, SparsePattern):
        return _patched(data, where, value)
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, int | float) and value == 0:
        return replace(data, gate=torch.where(_slots_at(data, where), 0.0, gate_of(data)), edited=True)
    given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise PatternIndexError(
        f"a part of a SparsePattern can be set to 0 or to a part of another SparsePattern; got {given}. To multiply "
        "probabilities use pattern.scale(factor, heads=…); to put in a dense pattern return a dense "
        "[batch, head, query, key] tensor from the hook."
    )


def put_back(data: PatternData, where: PatternIndex, part: PatternData) -> PatternData:
    """The pattern with an edited view of it in its place."""
    if part.cell is not data.cell:  # other blocks or scores than the pattern's own
        return _patched(data, where, SparsePattern(part))
    rows = block_span("query", where.rows, data.mask.q_len, data.mask.q_block)
    gate = gate_of(data).clone()
    gate[_grid(where, rows, gate.device)] = gate_of(part).to(gate)
    return replace(data, gate=gate, edited=True)


def _patched(data: PatternData, where: PatternIndex, value: SparsePattern) -> PatternData:
    """`data` with a part replaced by another run's pattern: its blocks, gate and probabilities."""
    theirs, mask = value.data_, data.mask
    if where.keys != (0, mask.kv_len):
        raise PatternIndexError("patching takes all keys of a row: leave the key axis as ':'.")
    rows = block_span("query", where.rows, mask.q_len, mask.q_block, remedy="patch whole query blocks")
    expected = (len(where.batch), len(where.heads), rows.stop - rows.start)
    same = (theirs.mask.q_block, theirs.mask.k_block, theirs.mask.kv_len) == (mask.q_block, mask.k_block, mask.kv_len)
    if same and theirs.mask.indices.shape[2] == expected[2] and theirs.mask.indices.shape[:2] != expected[:2]:
        given = " × ".join(map(str, theirs.mask.indices.shape[:2]))
        raise ValueError(
            f"a part of {expected[0]} × {expected[1]} (batch × heads) cannot be taken from one of {given}: give as "
            "many texts and heads on both sides, one text at a time where the other run has one."
        )
    if not same or theirs.mask.indices.shape[2] != expected[2]:
        raise ValueError(
            f"a part of {len(where.batch)} × {len(where.heads)} heads × {where.rows[1] - where.rows[0]} queries of "
            f"{mask!r} cannot be taken from {theirs.mask!r}: both runs need the same length and block sizes."
        )
    if theirs.mask.window != mask.window:
        raise ValueError(
            f"a pattern with window {theirs.mask.window} cannot be patched into one with window {mask.window}: take it "
            "from a layer with the same sliding window."
        )
    if theirs.mask.offset != mask.offset + rows.start * mask.q_block:
        raise ValueError(
            f"rows at positions {mask.offset + where.rows[0]} cannot be taken from rows at {theirs.mask.offset}: "
            "causality ties a row to its position."
        )
    sources, source_of = _joined_sources(data, theirs, where, rows)
    width = max(mask.k, theirs.mask.k)
    at = _grid(where, rows, mask.indices.device)
    indices = _widened(mask.indices, width, -1).clone()
    indices[at] = _widened(theirs.mask.indices, width, -1).to(indices.device)
    gate = None
    if data.gate is not None or theirs.gate is not None:
        gate = _widened(gate_of(data), width, 1.0).clone()
        gate[at] = _widened(gate_of(theirs), width, 1.0).to(gate)
    return masked(data, replace(mask, indices=indices), gate=gate, sources=sources, source_of=source_of)


def _joined_sources(
    data: PatternData, theirs: PatternData, where: PatternIndex, rows: slice
) -> tuple[tuple[Scores | None, ...], Tensor]:
    """Both patterns' scores, and for every row of query blocks the number of the one to use."""
    target = ([data.cell_rows[0][i] for i in where.batch], [data.cell_rows[1][i] for i in where.heads])
    origin = (theirs.cell_rows[0], theirs.cell_rows[1])
    device = data.mask.indices.device
    sources = list(data.sources)
    renumbered = []
    for scores in theirs.sources:
        if scores is not None:
            scores = _relabelled(scores, origin, target, data)
        known = next((n for n, ours in enumerate(sources) if ours is scores), None)
        renumbered.append(len(sources) if known is None else known)
        if known is None:
            sources.append(scores)
    shape = data.mask.indices.shape[:3]
    source_of = torch.zeros(shape, dtype=torch.long, device=device) if data.source_of is None else data.source_of
    new = torch.zeros(theirs.mask.indices.shape[:3], dtype=torch.long, device=device)
    new = new if theirs.source_of is None else theirs.source_of.to(device)
    source_of = source_of.clone()
    source_of[_grid(where, rows, device)] = torch.tensor(renumbered, device=device)[new]
    return tuple(sources), source_of


def _relabelled(
    scores: Scores, origin: tuple[list[int], list[int]], target: tuple[list[int], list[int]], data: PatternData
) -> Scores:
    """Scores laid out so that the target's batch rows and heads find the origin's: a head patched into another."""
    own_batch, own_heads = scores.q.shape[:2]
    batch, heads = (own_batch, own_heads) if data.sources[0] is None else data.sources[0].q.shape[:2]
    if target == origin and (batch, heads) == (own_batch, own_heads):
        return scores
    from_batch, from_heads = list(range(batch)), list(range(heads))
    from_batch = [min(i, own_batch - 1) for i in from_batch]
    from_heads = [min(i, own_heads - 1) for i in from_heads]
    for here, there in zip(target[0], origin[0], strict=True):
        from_batch[here] = there
    for here, there in zip(target[1], origin[1], strict=True):
        from_heads[here] = there
    return scores.of(from_batch, from_heads)


def _grid(where: PatternIndex, rows: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor(where.batch, device=device)[:, None, None],
        torch.tensor(where.heads, device=device)[None, :, None],
        torch.arange(rows.start, rows.stop, device=device),
    )


def _widened(x: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=fill)

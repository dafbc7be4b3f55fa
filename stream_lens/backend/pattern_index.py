"""Indexing of a SparsePattern: which batch rows, heads and query blocks an index means, or why it can mean none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

AXES = ("batch", "head", "query", "key")


class PatternIndexError(IndexError):
    """An index or edit that blocks cannot express; the message says what to use instead."""


@dataclass(frozen=True)
class PatternIndex:
    """An index with every axis spelt out.

    Attributes:
        batch, heads: positions along those axes, in the order asked for.
        rows, keys: token ranges [start, stop).
        dropped: axes that an integer took away.
        copies: whether an axis was indexed by a list or mask, which in torch gives a copy, not a view.
    """

    batch: list[int]
    heads: list[int]
    rows: tuple[int, int]
    keys: tuple[int, int]
    dropped: frozenset[int]
    copies: bool


def parse_index(
    index: Any, shape: tuple[int, int, int, int], present: tuple[int, ...], *, crossed: bool = False
) -> PatternIndex:
    """Spell out `index` on a pattern whose four axes have `shape`, of which only the axes `present` can be indexed.

    Lists on two axes are an error, since torch pairs them; with `crossed` they mean every pair.
    """
    items = [_plain(item) for item in (index if isinstance(index, tuple) else (index,))]
    if any(item is None for item in items):
        raise PatternIndexError("a SparsePattern takes no new axes (None in an index): index batch, head and query.")
    if any(item is Ellipsis for item in items):
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(present) - len(items) + 1)
    if len(items) > len(present):
        raise PatternIndexError(f"{len(items)} indices were given for a pattern of {len(present)} axes.")
    wanted: list[Any] = [slice(None)] * 4
    for axis, item in zip(present, items, strict=False):
        wanted[axis] = item
    dropped = frozenset(axis for axis in range(4) if _is_int(wanted[axis]))
    listed = [AXES[axis] for axis in range(4) if axis not in dropped and not isinstance(wanted[axis], slice)]
    if len(listed) > 1 and not crossed:
        raise PatternIndexError(
            f"lists on the {' and '.join(listed)} axes would be paired in torch, which blocks cannot express: index "
            "one axis by a list at a time, or use drop, keep or scale, whose lists mean every combination."
        )
    return PatternIndex(
        _positions("batch", wanted[0], shape[0]),
        _positions("head", wanted[1], shape[1]),
        _token_range("query", wanted[2], shape[2]),
        _token_range("key", wanted[3], shape[3]),
        dropped,
        bool(listed),
    )


def block_span(
    axis: str, tokens: tuple[int, int], length: int, block: int, *, remedy: str = "cut at block edges"
) -> slice:
    """The blocks that `tokens` are made of; an error if they cut through one."""
    start, stop = tokens
    if start == stop:
        return slice(start // block, start // block)
    if start % block or (stop % block and stop != length):
        low, high = start // block * block, min(-(-stop // block) * block, length)
        raise PatternIndexError(
            f"{axis} tokens {start}:{stop} cut through blocks of {block}: {remedy}, for example {low}:{high}, "
            f"or stream with a smaller {'q' if axis == 'query' else 'k'}_block."
        )
    return slice(start // block, -(-stop // block))


def _plain(item: Any) -> Any:
    """Tensors, and NumPy's arrays and integers, which TransformerLens' Slice makes of lists, as Python's."""
    if isinstance(item, np.ndarray | np.generic | torch.Tensor):
        if item.ndim > 1:
            raise PatternIndexError(
                f"a SparsePattern cannot be indexed by a tensor of shape {list(item.shape)}: index each axis by an "
                "integer, a slice or a list; drop and keep take a bool tensor of shape [batch, head, q_blocks, k]."
            )
        return item.tolist()
    return list(item) if isinstance(item, range | tuple) else item


def _is_int(item: Any) -> bool:
    """Whether it is one position. True and False are not: in torch they add an axis."""
    return isinstance(item, int) and not isinstance(item, bool)


def _positions(axis: str, item: Any, size: int) -> list[int]:
    if isinstance(item, slice):
        return list(range(size))[item]
    if _is_int(item):
        return [_within(axis, item, size)]
    if isinstance(item, list):
        if all(isinstance(chosen, bool) for chosen in item) and len(item) == size:
            return [at for at, chosen in enumerate(item) if chosen]
        if all(_is_int(at) for at in item):
            return [_within(axis, at, size) for at in item]
    raise PatternIndexError(
        f"the {axis} axis takes an integer, a slice, a list of integers, or {size} times True or False; got {item!r}."
    )


def _token_range(axis: str, item: Any, size: int) -> tuple[int, int]:
    if _is_int(item):
        at = _within(axis, item, size)
        return (at, at + 1)
    if isinstance(item, slice):
        start, stop, step = item.indices(size)
        if step == 1:
            return (start, max(start, stop))
    if isinstance(item, list) and item and all(_is_int(at) for at in item):  # TransformerLens' pos_slice
        first = _within(axis, item[0], size)
        if [_within(axis, at, size) for at in item] == list(range(first, first + len(item))):
            return (first, first + len(item))
    raise PatternIndexError(
        f"the {axis} axis takes an integer or a slice of step 1; got {item!r}. "
        "For single tokens' probabilities use pattern.to_dense(rows=slice(…), heads=[…])."
    )


def _within(axis: str, at: int, size: int) -> int:
    if not -size <= at < size:
        raise PatternIndexError(f"{axis} {at} is out of range: the pattern has {size}.")
    return at % size

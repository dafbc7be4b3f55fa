"""Runs: the patterns of one text after the other, from whatever a circuit tool is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache

from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import BlockMask

Pattern = SparsePattern | BlockMask | Tensor
Source = ActivationCache | Pattern | Mapping[int, Pattern]
"""A cache (of a HookedTransformer or a bridge, sparse or dense, from memory or from a file), one pattern, or patterns
by layer. A batch is as many texts as it has rows."""

_PATTERN_NAME = re.compile(r"blocks\.(\d+)\.attn\.hook_pattern")


@dataclass(frozen=True, eq=False)
class Run:
    """One text's patterns by layer, each with a batch of 1.

    Attributes:
        layers: a SparsePattern, a BlockMask, or a dense tensor [1, head, query, key] for each layer.
        observe: whether masses are shares of the dense pattern, so that a row's kept blocks sum to less than 1.
        model_name: of the cache; empty where it does not say.
    """

    layers: dict[int, Pattern]
    observe: bool = False
    model_name: str = ""

    @property
    def about(self) -> str:
        """See `about_masks`."""
        return about_masks(self.model_name, self.layers.values())


def about_masks(model_name: str | None, masks: Iterable[Any]) -> str:
    """Model, T, k and pruned share of a run, for titles of pictures; empty where nothing is known."""
    known = [each if isinstance(each, BlockMask) else each.mask for each in masks if not _is_dense(each)]
    parts = [model_name] if model_name else []
    if known:
        parts += [f"T = {known[0].kv_len:,}", f"k = {max(mask.k for mask in known)}"]
        parts.append(f"{mean_pruned(known, 'causal'):.1%} of the causal half pruned")
    return ", ".join(parts)


def mean_pruned(masks: Sequence[BlockMask], of: str) -> float:
    """The mean of the masks' `sparsity`."""
    return sum(mask.sparsity(of) for mask in masks) / len(masks)


def _is_dense(pattern: Any) -> bool:
    return not isinstance(pattern, BlockMask | SparsePattern)


def runs_of(source: Source | Iterable[Source]) -> Iterator[Run]:
    """Every text of a source, or of several, in order. Only one is held at a time when an iterator is given.

    Raises:
        TypeError: something else than a cache, a pattern, a mask, or these by layer.
        ValueError: a cache without patterns; layers of different batch sizes.
    """
    if isinstance(source, Iterable) and not isinstance(source, ActivationCache | Tensor | Mapping):
        for each in source:
            yield from runs_of(each)
        return
    layers = {layer: _with_batch(pattern) for layer, pattern in sorted(_layers(source).items())}
    sizes = {pattern.shape[0] for pattern in layers.values()}
    if len(sizes) > 1:
        raise ValueError(f"the layers have batches of {sorted(sizes)}: give patterns of the same texts.")
    info = getattr(source, "info", None)
    observe, model_name = bool(getattr(info, "observe", False)), getattr(info, "model_name", None) or ""
    for row in range(sizes.pop()):
        yield Run({layer: _row(pattern, row) for layer, pattern in layers.items()}, observe, model_name)


def _layers(source: Source) -> dict[int, Pattern]:
    if isinstance(source, ActivationCache):
        found: dict[int, Pattern] = {}
        for name, value in source.cache_dict.items():
            if match := _PATTERN_NAME.fullmatch(name):
                found[int(match[1])] = value
        if not found:
            raise ValueError("this cache has no patterns: let names_filter pass 'hook_pattern'.")
        return found
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("no patterns were given: the mapping is empty.")
        return dict(source)
    if isinstance(source, SparsePattern):
        return {source.data_.layer or 0: source}
    if isinstance(source, Tensor | BlockMask):
        return {0: source}
    raise TypeError(
        f"a {type(source).__name__} was given: give a cache, a SparsePattern, a BlockMask, a dense pattern, a dict of "
        "these by layer, or several of them."
    )


def _with_batch(pattern: Any) -> Pattern:
    if isinstance(pattern, SparsePattern):
        return SparsePattern(replace(pattern.data_, present=(0, 1, 2, 3)))
    if isinstance(pattern, BlockMask):
        return pattern
    if not isinstance(pattern, Tensor) or pattern.ndim not in (3, 4):
        given = f"a tensor of shape {list(pattern.shape)}" if isinstance(pattern, Tensor) else type(pattern).__name__
        raise TypeError(
            f"{given} is no pattern: give a SparsePattern, a BlockMask, or a dense tensor [batch, head, query, key] or "
            "[head, query, key]."
        )
    return pattern if pattern.ndim == 4 else pattern[None]


def _row(pattern: Pattern, row: int) -> Pattern:
    if isinstance(pattern, BlockMask):
        return pattern.select(batch=slice(row, row + 1))
    return pattern[row : row + 1]

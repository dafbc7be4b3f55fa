"""SparseActivationCache: an ActivationCache whose patterns are SparsePatterns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import BlockMask, StreamConfig


@dataclass(frozen=True, eq=False)
class RunInfo:
    """What a cache knows of the run that made it.

    Attributes:
        model_name: TransformerLens' name of the model.
        config: what the run kept; None in a cache that no streamed run made.
        observe: whether dense outputs flowed on, so that masses are shares of the dense pattern.
        tokens: [batch, position] token ids, None where the run was given something else than text or ids.
    """

    model_name: str
    config: StreamConfig | None
    observe: bool = False
    tokens: Int[Tensor, "batch position"] | None = None


@dataclass(frozen=True)
class Compression:
    """Sizes of a cache's patterns beside the dense ones'.

    Attributes:
        dense_bytes: T² entries of every cached pattern, in the pattern's own dtype.
        sparse_bytes: indices, gates and block masses.
        by_entries: dense entries per kept block, the ratio the paper reports: no index or mass counts.
    """

    dense_bytes: int
    sparse_bytes: int
    by_entries: float

    @property
    def by_bytes(self) -> float:
        """Dense bytes per byte that is really stored."""
        return self.dense_bytes / max(self.sparse_bytes, 1)


class SparseActivationCache(ActivationCache):
    """An ActivationCache in which every pattern is a `SparsePattern`. All else is as in TransformerLens.

    Attributes:
        info: model, config and tokens of the run.
    """

    def __init__(
        self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True, info: RunInfo | None = None
    ) -> None:
        super().__init__(cache_dict, model, has_batch_dim=has_batch_dim)
        self.info = info or RunInfo("", None)

    def __repr__(self) -> str:
        layers = list(self.patterns())
        return f"SparseActivationCache of {len(self)} activations, with patterns of layers {layers}"

    def __getitem__(self, key: Any) -> Any:
        if self.model is None and isinstance(key, tuple) and any(isinstance(n, int) and n < 0 for n in key):
            raise ValueError(f"{key!r} counts layers from the end, which takes the model: load(path, model) has it.")
        return super().__getitem__(key)

    def patterns(self) -> dict[int, SparsePattern]:
        """The cached sparse patterns by layer."""
        found = {}
        for name, value in self.cache_dict.items():
            if isinstance(value, SparsePattern):
                found[int(name.split(".")[1])] = value
        return dict(sorted(found.items()))

    def masks(self) -> dict[int, BlockMask]:
        """The kept blocks by layer."""
        return {layer: pattern.mask for layer, pattern in self.patterns().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of everything cached; queries and keys that patterns refer to are counted once each."""
        total, seen = 0, set()
        for value in self.cache_dict.values():
            if isinstance(value, SparsePattern):
                total += value.nbytes
                parts = [part for scores in value.data_.sources if scores is not None for part in (scores.q, scores.k)]
            elif type(value) is Tensor:
                parts = [value]
            else:
                continue  # scores that were never made
            for part in parts:
                storage = part.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
        return total

    def compression(self) -> Compression:
        """Sizes of the patterns against dense ones. `ValueError` where the cache has no sparse pattern."""
        patterns = self.patterns()
        if not patterns:
            raise ValueError("this cache has no sparse patterns: let names_filter pass 'hook_pattern'.")
        entries = {layer: _product(pattern.mask.shape) for layer, pattern in patterns.items()}
        kept = sum(int(pattern.mask.kept.sum()) for pattern in patterns.values())
        return Compression(
            dense_bytes=sum(entries[layer] * pattern.dtype.itemsize for layer, pattern in patterns.items()),
            sparse_bytes=sum(pattern.nbytes for pattern in patterns.values()),
            by_entries=sum(entries.values()) / max(kept, 1),
        )

    def stack_activation(self, activation_name: str, layer: int = -1, sublayer_type: str | None = None) -> Any:
        """As in TransformerLens; patterns come as a list by layer, since layers may differ in how much they keep."""
        if layer is None or layer == -1:
            layer = self.model.cfg.n_layers if self.model is not None else 1 + max(self.patterns(), default=-1)
        parts = [self[(activation_name, number, sublayer_type)] for number in range(layer)]
        if any(isinstance(part, SparsePattern) for part in parts):
            return parts
        return torch.stack(parts, dim=0)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> SparseActivationCache:
        """As in TransformerLens, for patterns too."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        info = self.info
        if info.tokens is not None:
            chosen = (batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)).apply(info.tokens)
            info = replace(info, tokens=chosen.reshape(-1, info.tokens.shape[-1]))
        return SparseActivationCache(sliced.cache_dict, self.model, sliced.has_batch_dim, info)

    def without_scores(self) -> SparseActivationCache:
        """A cache whose patterns hold masks, gates and masses only: no `to_dense`, no patching, less memory."""
        from stream_lens.backend.layer import without_scores

        light = {
            name: without_scores(value) if isinstance(value, SparsePattern) else value
            for name, value in self.cache_dict.items()
        }
        return SparseActivationCache(light, self.model, self.has_batch_dim, self.info)

    def save(self, path: str | PathLike[str], *, scores: bool = False) -> None:
        """Write the cache to one safetensors file; see `stream_lens.cache.save`."""
        from stream_lens.cache import save

        save(self, path, scores=scores)

    @staticmethod
    def load(path: str | PathLike[str], model: Any = None, device: str | torch.device = "cpu") -> SparseActivationCache:
        """Read a file that `save` wrote; see `stream_lens.cache.load`."""
        from stream_lens.cache import load

        return load(path, model, device)


def run_with_cache_of(run: Callable[..., Any]) -> Callable[..., Any]:
    """A model class's run_with_cache that gives a SparseActivationCache."""

    @functools.wraps(run)
    def run_with_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        output, cache = result
        if not isinstance(cache, ActivationCache):
            return result  # return_cache_object=False
        session = self.__dict__["_stream_session"]
        given = args[0] if args else kwargs.get("input")
        first = session.layers[0] if session.layers else None
        info = RunInfo(
            model_name=str(getattr(self.cfg, "model_name", "")),
            config=None if first is None else first.config,
            observe=False if first is None else first.observe,
            tokens=_tokens(self, given, kwargs),
        )
        return output, SparseActivationCache(cache.cache_dict, cache.model, cache.has_batch_dim, info)

    return run_with_cache


def _tokens(model: Any, given: Any, kwargs: dict[str, Any]) -> Tensor | None:
    if isinstance(given, Tensor):
        if given.is_floating_point():
            return None
        tokens = given
    elif isinstance(given, str | list) and getattr(model, "tokenizer", None) is not None:
        options = {name: kwargs[name] for name in ("prepend_bos", "padding_side") if kwargs.get(name) is not None}
        tokens = model.to_tokens(given, **options)
    else:
        return None
    return tokens.detach().cpu().reshape(-1, tokens.shape[-1])


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total

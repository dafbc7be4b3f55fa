"""What torch functions do on a SparsePattern: metadata, moves, a few steps of TransformerLens' forward, or an error."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stream_lens.backend.layer import attend_pattern
from stream_lens.backend.lazy_tensor import METADATA, DenseNeededError, Marker, target_of_to
from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.pattern_data import cached_copy, moved
from stream_lens.backend.pattern_index import parse_index


def pattern_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`SparsePattern.__torch_function__`."""
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    handler = _HANDLERS.get(func)
    if handler is None:
        name = getattr(func, "__name__", str(func))
        raise DenseNeededError(
            f"{name} on a SparsePattern would need the T × T pattern. Use pattern.to_dense(rows=slice(…), heads=[…]) "
            "for probabilities of some rows, pattern.block_mass and pattern.mask for all, and pattern.scale, drop or "
            "keep to edit."
        )
    return handler(*args, **kwargs)


def _detach(pattern: SparsePattern) -> SparsePattern:
    run = pattern.data_.run
    copy = SparsePattern(cached_copy(pattern.data_, getattr(run, "keep_scores", True)))
    running = getattr(run, "pattern", None)
    copy.copy_of_ = pattern.copy_of_ if running is None else weakref.ref(running)
    return copy


def _to(pattern: SparsePattern, *args: Any, **kwargs: Any) -> SparsePattern:
    device, dtype = target_of_to(pattern, *args, **kwargs)
    data = pattern.data_
    if device is not None and torch.device(device) != data.mask.indices.device:
        data = moved(data, device)
    if dtype is not None:
        data = replace(data, dtype=dtype)
    if data is pattern.data_:
        return pattern
    moved_copy = SparsePattern(data)
    moved_copy.copy_of_ = pattern.copy_of_
    return moved_copy


def _matmul(pattern: Any, values: Any) -> Any:
    if not isinstance(pattern, SparsePattern):
        raise DenseNeededError("a SparsePattern can only stand on the left of a matrix product: pattern @ v.")
    return attend_pattern(pattern, values)


def _times(pattern: Any, factor: Any) -> SparsePattern:
    pattern, factor = (pattern, factor) if isinstance(pattern, SparsePattern) else (factor, pattern)
    if isinstance(factor, Tensor) and factor.ndim == 0 and not factor.requires_grad:
        factor = factor.item()
    if not isinstance(factor, int | float):
        raise DenseNeededError(
            "a SparsePattern can be multiplied by one number: for more use pattern.scale, with_gate or to_dense."
        )
    return pattern.scale(factor)


def _in_place_times(pattern: SparsePattern, factor: Any) -> SparsePattern:
    return pattern.become_(_times(pattern, factor).data_)


def _where(condition: Any, given: Any, otherwise: Any) -> Any:
    if isinstance(condition, Marker) and isinstance(given, Marker) and isinstance(otherwise, SparsePattern):
        return otherwise  # TransformerLens' scrub of NaN rows: rows that see nothing are 0 here by definition
    raise DenseNeededError("torch.where needs the T × T pattern: use pattern.drop, keep or scale.")


def _dropout(pattern: SparsePattern, p: float = 0.5, training: bool = True, inplace: bool = False) -> SparsePattern:
    if training and p > 0:
        raise RuntimeError("attention dropout cannot run sparse: call model.eval() first.")
    return pattern


def _squeeze(pattern: SparsePattern, dim: int) -> SparsePattern:
    axis = pattern.data_.present[dim]
    if pattern.shape[dim] != 1:
        return pattern
    if axis > 2:
        raise DenseNeededError("the key axis of a SparsePattern cannot be squeezed.")
    return _view(pattern, tuple(a for a in pattern.data_.present if a != axis))


def _unsqueeze(pattern: SparsePattern, dim: int) -> SparsePattern:
    present = pattern.data_.present
    if dim != 0 or present[0] == 0:
        raise DenseNeededError("a SparsePattern can only get its batch axis back: pattern.unsqueeze(0).")
    return _view(pattern, (present[0] - 1, *present))


def _view(pattern: SparsePattern, present: tuple[int, ...]) -> SparsePattern:
    """All of a pattern with other axes."""
    data = pattern.data_
    return SparsePattern(replace(data, present=present), (pattern, parse_index((), data.mask.shape, data.present)))


def _set(pattern: Any, index: Any, value: Any) -> None:
    if not isinstance(pattern, SparsePattern):
        raise DenseNeededError(
            "a part of a SparsePattern cannot be written into a dense pattern as it is: make it dense first, as in "
            "dense[:, 2] = sparse.to_dense(heads=2), or stream both runs."
        )
    pattern[index] = value


def _clone(pattern: SparsePattern, **_: Any) -> SparsePattern:
    return SparsePattern(replace(pattern.data_))


_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.detach: _detach,
    Tensor.clone: _clone,
    torch.clone: _clone,
    Tensor.contiguous: lambda pattern, **_: pattern,
    Tensor.to: _to,
    Tensor.cpu: lambda pattern, **_: _to(pattern, "cpu"),
    Tensor.cuda: lambda pattern, device="cuda", **_: _to(pattern, device),
    Tensor.float: lambda pattern: _to(pattern, torch.float32),
    Tensor.type_as: lambda pattern, other: _to(pattern, other.dtype),
    Tensor.__getitem__: lambda pattern, index: SparsePattern.__getitem__(pattern, index),
    Tensor.__setitem__: _set,
    Tensor.__format__: lambda pattern, _: repr(pattern),
    Tensor.squeeze: _squeeze,
    Tensor.unsqueeze: _unsqueeze,
    Tensor.mul: _times,
    Tensor.__mul__: _times,
    Tensor.__rmul__: _times,
    torch.mul: _times,
    Tensor.__imul__: _in_place_times,
    Tensor.mul_: _in_place_times,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.matmul: _matmul,
    torch.isnan: lambda pattern: Marker(pattern.shape, pattern.device),
    torch.zeros_like: lambda pattern, **_: Marker(pattern.shape, pattern.device),
    torch.where: _where,
    torch.nn.functional.dropout: _dropout,
}

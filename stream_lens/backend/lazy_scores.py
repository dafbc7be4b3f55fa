"""LazyScores: the attention scores that a streamed layer never computes.

TransformerLens makes scores = q @ kᵀ, scales, soft-caps, masks, hooks and softmaxes them. A LazyScores goes through
those steps in the scores' place and only notes them; at the softmax it becomes a SparsePattern. LazyHeads does the same
for keys and values, so that TransformerLens' expansion of grouped heads copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from stream_lens.backend.lazy_tensor import METADATA, DenseNeededError, UncomputedScores, target_of_to
from stream_lens.backend.scores import Scores
from stream_lens.blocks import ScoreRule

if TYPE_CHECKING:
    from stream_lens.backend.layer import StreamedLayer


@dataclass(frozen=True, eq=False)
class Steps:
    """What has been done to q @ kᵀ so far: ``outer · tanh(inner · q·k)``, or ``inner · q·k`` without the tanh."""

    q: Tensor
    k: Tensor
    layer: StreamedLayer
    inner: float = 1.0
    outer: float | None = None
    offset: int | None = None
    window: int | None = None
    key_mask: Bool[Tensor, "batch key"] | None = None
    sinks: Tensor | None = None
    sink_column: bool = False
    normalised: bool = False

    def rule(self) -> ScoreRule:
        cap = self.outer
        offset = self.k.shape[2] - self.q.shape[2] if self.offset is None else self.offset
        scale = self.inner if cap is None else self.inner * cap
        return ScoreRule(scale, offset, self.window, cap, self.key_mask, self.sinks)

    def scores(self) -> Scores:
        return Scores(self.q, self.k, self.rule())


class LazyScores(torch.Tensor):
    """Scores of shape [batch, head, query, key] as the steps that would make them."""

    steps: Steps

    @staticmethod
    def __new__(cls, steps: Steps) -> LazyScores:
        batch, heads, query_len, _ = steps.q.shape
        shape = (batch, heads, query_len, steps.k.shape[2] + steps.sink_column)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=steps.q.dtype, device=steps.q.device)
        made.steps = steps
        return made

    def __init__(self, steps: Steps) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyScores({list(self.shape)}): never computed; the layer's pattern has what can be read and edited"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        handler = _SCORE_HANDLERS.get(func)
        if handler is None:
            name = getattr(func, "__name__", str(func))
            raise DenseNeededError(
                f"{name} on attention scores of a streamed layer: the T × T scores are never made, so they cannot be "
                "read or edited. Edit the pattern instead: hook_pattern with pattern.drop, keep, scale or "
                "pattern[:, h] = 0."
            )
        return handler(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DenseNeededError(f"{func} would need the T × T scores, which a streamed layer never makes.")


class LazyHeads(torch.Tensor):
    """Keys or values [batch, kv_head, key, d_head] that stay unexpanded while their logical shape changes."""

    heads: Tensor
    layer: StreamedLayer

    @staticmethod
    def __new__(cls, heads: Tensor, layer: StreamedLayer, shape: torch.Size | None = None) -> LazyHeads:
        made = torch.Tensor._make_wrapper_subclass(
            cls, heads.shape if shape is None else shape, dtype=heads.dtype, device=heads.device
        )
        made.heads, made.layer = heads, layer
        return made

    def __init__(self, heads: Tensor, layer: StreamedLayer, shape: torch.Size | None = None) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyHeads({list(self.shape)} of {list(self.heads.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _RESHAPES:
            meta = torch.empty(args[0].shape, device="meta")
            return LazyHeads(args[0].heads, args[0].layer, func(meta, *args[1:], **kwargs).shape)
        if func is Tensor.to:
            _, dtype = target_of_to(*args, **kwargs)
            return args[0] if dtype is None else LazyHeads(args[0].heads.to(dtype), args[0].layer, args[0].shape)
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return _product(*args)
        raise DenseNeededError(f"{getattr(func, '__name__', func)} is not a step of attention that stream_lens knows.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DenseNeededError(f"{func} is not a step of attention that stream_lens knows.")


_RESHAPES = frozenset(
    {
        Tensor.__getitem__,
        Tensor.expand,
        Tensor.reshape,
        Tensor.repeat_interleave,
        torch.repeat_interleave,
        Tensor.transpose,
        torch.transpose,
        Tensor.contiguous,
    }
)


def _product(left: Any, right: Any) -> Any:
    """q @ kᵀ makes scores; pattern @ v attends (also a dense pattern that a hook returned)."""
    from stream_lens.backend.layer import attend
    from stream_lens.backend.pattern import SparsePattern

    assert isinstance(right, LazyHeads)
    if isinstance(left, SparsePattern) or right.layer.pattern is not None:
        return attend(right.layer, left, right.heads)
    if right.shape[-2:] == (left.shape[-1], right.heads.shape[-2]):
        return LazyScores(Steps(left, right.heads, right.layer))
    raise right.layer.score_edit_error()


def softmax(scores: LazyScores, dim: int = -1, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """Where scores become a pattern; with a sink column still to be cut off, one step later."""
    if dim not in (-1, 3):
        raise DenseNeededError(f"the softmax of attention runs over keys, dim -1; got dim {dim}.")
    if scores.steps.sink_column:
        return LazyScores(replace(scores.steps, normalised=True))
    return scores.steps.layer.make_pattern(scores.steps.scores(), dtype or scores.dtype)


def _multiplied(scores: Any, factor: Any) -> LazyScores:
    scores, factor = (scores, factor) if isinstance(scores, LazyScores) else (factor, scores)
    steps, factor = _unmasked(scores), _number(factor)
    if steps.outer is None:
        return LazyScores(replace(steps, inner=steps.inner * factor))
    return LazyScores(replace(steps, outer=steps.outer * factor))


def _tanh(scores: LazyScores) -> LazyScores:
    return LazyScores(replace(_unmasked(scores), outer=1.0))


def _unmasked(scores: LazyScores) -> Steps:
    """The steps of scores that the model itself still scales; once masked, only a hook would change them."""
    if scores.steps.offset is not None:
        raise scores.steps.layer.score_edit_error()
    return scores.steps


def _number(factor: Any) -> float:
    if isinstance(factor, Tensor) and factor.numel() == 1:
        return float(factor)
    if isinstance(factor, int | float):
        return float(factor)
    raise DenseNeededError("attention scores can be scaled by one number only.")


def _cat(tensors: Any, dim: int = 0) -> LazyScores:
    """GPT-OSS: the learnt sink joins the scores as one more key column."""
    scores, column = tensors
    if not isinstance(scores, LazyScores) or dim not in (-1, 3) or column.shape[-1] != 1:
        raise DenseNeededError("only a sink column can be joined to attention scores.")
    return LazyScores(replace(scores.steps, sinks=column[0, :, 0, 0], sink_column=True))


@dataclass(frozen=True)
class _RowMaximum:
    """Of scores with a sink column: subtracting it changes no softmax, so it is noted by doing nothing."""

    values: torch.Tensor


def _max(scores: LazyScores, dim: int = -1, keepdim: bool = False) -> _RowMaximum:
    return _RowMaximum(LazyScores(scores.steps))


def _minus(scores: Any, other: Any) -> LazyScores:
    if isinstance(scores, LazyScores) and isinstance(other, LazyScores) and scores.steps is other.steps:
        return scores
    raise DenseNeededError("nothing can be subtracted from attention scores of a streamed layer.")


def _item(scores: LazyScores, index: Any) -> Any:
    if scores.steps.normalised and index == (Ellipsis, slice(None, -1)):
        return scores.steps.layer.make_pattern(scores.steps.scores(), scores.dtype)
    if index == (slice(None),) * len(index if isinstance(index, tuple) else (index,)):
        return scores
    raise DenseNeededError(
        "attention scores of a streamed layer are never made: read pattern.to_dense(rows=slice(…), heads=[…]) instead."
    )


def _detach(scores: LazyScores) -> UncomputedScores:
    return UncomputedScores(scores.shape, scores.dtype, scores.device)


_SCORE_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.mul: _multiplied,
    Tensor.__mul__: _multiplied,
    Tensor.__rmul__: _multiplied,
    torch.mul: _multiplied,
    Tensor.div: lambda scores, by: _multiplied(scores, 1.0 / _number(by)),
    Tensor.__truediv__: lambda scores, by: _multiplied(scores, 1.0 / _number(by)),
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    torch.cat: _cat,
    Tensor.max: _max,
    torch.max: _max,
    Tensor.sub: _minus,
    Tensor.__sub__: _minus,
    torch.sub: _minus,
    Tensor.to: lambda scores, *args, **kwargs: scores,
    Tensor.detach: _detach,
    Tensor.__format__: lambda scores, _: repr(scores),
    Tensor.__getitem__: _item,
    torch.softmax: softmax,
    Tensor.softmax: softmax,
    torch.nn.functional.softmax: softmax,
}

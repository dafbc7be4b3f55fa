"""Tensors without storage that stand in TransformerLens' attention code: what they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

METADATA = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor.grad_fn.__get__,  # type: ignore[attr-defined, union-attr]
        Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        Tensor.is_meta.__get__,  # type: ignore[attr-defined]
        Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
        Tensor.is_quantized.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.nelement,
        Tensor.element_size,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.get_device,
        Tensor.__len__,
        torch.is_floating_point,
        torch.is_complex,
        torch.is_tensor,
        torch.numel,
    }
)
"""Functions of shape, type and place alone, which need no storage."""


class DenseNeededError(RuntimeError):
    """An operation on scores or a pattern of a streamed layer would need the T × T tensor, which is never made.

    Not a TypeError: Python's operators would swallow that together with its message.
    """


class Marker(torch.Tensor):
    """Stands for a T × T tensor that TransformerLens makes and only hands to one function we absorb."""

    @staticmethod
    def __new__(cls, shape: torch.Size, device: torch.device) -> Marker:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Marker({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DenseNeededError(
            f"{func} would need a T × T tensor, which a streamed model never makes: to change a pattern use "
            "pattern[:, head] = 0, pattern.scale, drop or keep."
        )


class UncomputedScores(torch.Tensor):
    """What a cache holds under `hook_attn_scores`: the shape of scores that a streamed layer never made."""

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> UncomputedScores:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"UncomputedScores({list(self.shape)}): a streamed layer never makes its scores; see its pattern"

    def __deepcopy__(self, memo: dict[int, Any]) -> UncomputedScores:
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return UncomputedScores, (self.shape, self.dtype, self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        scores = args[0]
        if func in (Tensor.detach, Tensor.clone, Tensor.cpu):
            return scores
        if func is Tensor.__format__:
            return repr(scores)
        if func is Tensor.to:
            device, dtype = target_of_to(scores, *args[1:], **kwargs)
            return UncomputedScores(scores.shape, dtype or scores.dtype, torch.device(device or scores.device))
        if func in (Tensor.__getitem__, Tensor.squeeze, Tensor.unsqueeze):
            shape = func(torch.empty(scores.shape, device="meta"), *args[1:], **kwargs).shape
            return UncomputedScores(shape, scores.dtype, scores.device)
        raise DenseNeededError(
            f"{getattr(func, '__name__', func)} on attention scores of a streamed layer, which were never made: use "
            "the layer's pattern, for example cache['pattern', layer].to_dense(rows=slice(…), heads=[…])."
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DenseNeededError(f"{func} would need T × T scores, which a streamed layer never makes.")


def target_of_to(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, torch.dtype | None]:
    """Device and dtype that ``x.to(*args, **kwargs)`` asks for, None for those it leaves."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, str | int | torch.device):
            device = arg
    return device, dtype

"""What the tests of the backend ask of a model: its hooks in order, a run with one hook, a largest difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

PATTERN = "attn.hook_pattern"
SCORES = "attn.hook_attn_scores"


def names_fired(model: Any, tokens: Tensor) -> list[str]:
    """Every hook that fires in one forward, in order."""
    names: list[str] = []

    def note(x: Any, hook: Any) -> None:
        names.append(hook.name)

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(lambda _: True, note)])
    return names


def with_hook(model: Any, tokens: Tensor, edit: Callable[[Any], Any], layer: int = 1, at: str = PATTERN) -> Tensor:
    """Logits of a run in which one layer's activation goes through `edit`."""

    def through(x: Any, hook: Any) -> Any:
        return edit(x)

    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.{at}", through)])


def worst(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest absolute difference over pairs of tensors of the same shape."""
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def cached_gap(ours: Any, dense: Any, names: Iterable[str]) -> float:
    """The largest difference of two caches over some names, where both hold tensors."""
    return worst(*((ours[name], dense[name]) for name in names))

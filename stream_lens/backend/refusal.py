"""Architectures that would run dense, or wrongly, are refused by name."""

from __future__ import annotations

from typing import Any


class UnsupportedArchitectureError(NotImplementedError):
    """This model's attention cannot be streamed; the message names it and says why."""


def refuse(model: Any, reason: str) -> UnsupportedArchitectureError:
    """The error for `model`; raise it."""
    cfg = getattr(model, "cfg", None)
    name = getattr(cfg, "model_name", None) or type(model).__name__
    kind = getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", None)
    return UnsupportedArchitectureError(
        f"{name}{f' ({kind})' if kind else ''} cannot be streamed: {reason}. The README lists supported architectures."
    )

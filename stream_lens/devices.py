"""Whether a device can be used, asked before minutes of work go to it."""

from __future__ import annotations

import torch


def require_device(device: str | torch.device) -> None:
    """`ValueError` if this machine has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {str(error).partition(chr(10))[0]}") from error

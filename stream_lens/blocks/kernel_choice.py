"""Which path runs attention and the search: Triton on GPUs, the C++ operators on CPUs, plain torch everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from stream_kernels.cpu import (
    cpu_available,
    cpu_block_attention_backward,
    cpu_block_attention_forward,
    cpu_select_blocks,
)
from stream_kernels.launch import why_not_triton
from stream_lens.blocks import torch_attention
from stream_lens.blocks.config import StreamConfig
from stream_lens.blocks.search import CHUNK_BYTES, Search

Kernel = Literal["auto", "triton", "cpp", "torch"]
KERNELS: tuple[str, ...] = get_args(Kernel)


@dataclass(frozen=True)
class KernelPath:
    """Forward and backward of one implementation, all with the signature of `torch_attention`."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


def _triton_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from stream_kernels.block_attention.forward import block_attention_forward  # imports Triton

    return block_attention_forward(*args, **kwargs)


def _triton_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    from stream_kernels.block_attention.backward import block_attention_backward  # imports Triton

    return block_attention_backward(*args, **kwargs)


PATHS = {
    "triton": KernelPath("triton", _triton_forward, _triton_backward),
    "cpp": KernelPath("cpp", cpu_block_attention_forward, cpu_block_attention_backward),
    "torch": KernelPath(
        "torch",
        partial(torch_attention.forward, chunk_bytes=CHUNK_BYTES),
        partial(torch_attention.backward, chunk_bytes=CHUNK_BYTES),
    ),
}


def _triton_search(*args: Any, **kwargs: Any) -> Tensor:
    from stream_kernels.select_blocks.select import select_blocks_triton  # imports Triton

    return select_blocks_triton(*args, **kwargs)


SEARCHES: dict[str, Callable[..., Tensor]] = {"triton": _triton_search, "cpp": cpu_select_blocks}


def choose_kernel(kernel: Kernel, q: Tensor) -> KernelPath:
    """The path for tensors like `q` ([..., d_head]): the fastest that can run, or the one asked for.

    Raises:
        ValueError: `kernel` is not one of `KERNELS`.
        RuntimeError: a forced path cannot run on such tensors here; the message says why.
    """
    check_kernel(kernel)
    if kernel != "auto":
        reason = why_not(kernel, q.device, q.dtype, q.shape[-1])
        if reason is not None:
            raise RuntimeError(f"kernel={kernel!r} cannot run here: {reason}")
        return PATHS[kernel]
    # The interpreter runs Triton on CPU tensors for tests: it is never the fastest path.
    fastest = "cpp" if q.device.type == "cpu" else "triton"
    return PATHS["torch" if why_not(fastest, q.device, q.dtype, q.shape[-1]) else fastest]


def choose_search(kernel: Kernel, search: Search) -> str:
    """The path that searches for blocks, as `choose_kernel` does: "triton", "cpp" or "torch"."""
    check_kernel(kernel)
    if kernel != "auto":
        reason = why_not_search(kernel, search)
        if reason is not None:
            raise RuntimeError(f"kernel={kernel!r} cannot run here: {reason}")
        return kernel
    fastest = "cpp" if search.q.device.type == "cpu" else "triton"
    return "torch" if why_not_search(fastest, search) else fastest


def why_not_search(kernel: str, search: Search) -> str | None:
    """One sentence that says why a path cannot run this search; None when it can."""
    if kernel == "torch":
        return None
    selector = search.config.selector
    # How many candidates the oracle has is known to the data only, and compiled code does not wait for data.
    oracle = selector == "exhaustive" and kernel == "cpp" and not torch.compiler.is_compiling()
    if selector != "stream" and not oracle:
        return f"selector {selector!r} runs in plain torch only: use kernel='auto' or 'torch'."
    q = search.q
    reason = why_not(kernel, q.device, q.dtype, q.shape[-1])
    if reason is None and kernel == "triton":
        from stream_kernels.select_blocks.configs import unsupported

        reason = unsupported(d_head=q.shape[-1], slots=search.slots, **search_options(search.config))
    return reason


def search_options(config: StreamConfig) -> dict[str, Any]:
    """The choices that the compiled searches take."""
    names = ("q_block", "k_block", "representative", "reduce", "rank", "oversample", "query_stride")
    return {name: getattr(config, name) for name in names}


def run_search(path: str, search: Search) -> Int[Tensor, "batch head q_blocks slots"]:
    """The finished indices, forced blocks included, by a compiled path."""
    if search.config.selector == "exhaustive":
        search = over_every_block(search)
    ranges = search.ranges
    return SEARCHES[path](
        search.q,
        search.k,
        search.rule,
        first=ranges.first,
        sink_stop=ranges.sink_stop,
        local_start=ranges.local_start,
        stop=ranges.stop,
        free=search.free,
        slots=search.slots,
        rounds=search.rounds,
        **search_options(search.config),
    )


def over_every_block(search: Search) -> Search:
    """The oracle as a search without rounds: every block is a candidate, ranked by all rows and all its keys."""
    length = (search.ranges.local_start - search.ranges.sink_stop)[:, None]
    candidates = torch.where(search.free > 0, -(-length // search.free.clamp(min=1)), 0)
    config = replace(search.config, oversample=max(2, int(candidates.max())), query_stride=1)
    return replace(search, config=config, rounds=0)


def check_kernel(kernel: str) -> None:
    """Raise ValueError unless `kernel` is "auto" or names a path."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is not known: choose one of {', '.join(KERNELS)}.")


def why_not(kernel: str, device: torch.device, dtype: torch.dtype, d_head: int) -> str | None:
    """One sentence that says why a path cannot attend over such tensors here; None when it can."""
    if kernel == "triton":
        return why_not_triton(device, dtype, d_head)
    return why_not_cpp(device, dtype) if kernel == "cpp" else None


def why_not_cpp(device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence that says why the C++ operators cannot take such tensors here; None when they can.

    Builds the operators at the first call for CPU tensors of a dtype that they take.
    """
    if device.type != "cpu":
        return f"the C++ operators take CPU tensors, not '{device.type}': use kernel='triton' or 'torch'."
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ operators take float32 and bfloat16, not {dtype}: convert, or use kernel='torch'."
    live, reason = cpu_available()
    return None if live else f"{reason}. Or use kernel='torch'."

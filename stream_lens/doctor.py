"""Which paths are live on this machine, for attention and for the search, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stream_lens.blocks.kernel_choice import why_not


@dataclass(frozen=True)
class PathStatus:
    """Whether one path can run here.

    Attributes:
        work: "attention" or "selection".
        path: "triton", "cpp" or "torch", as the `kernel` argument of both functions names them.
        tensors: which tensors it serves.
        live: whether it can run here.
        detail: what was found; where the path is not live, why, and what to do.
    """

    work: str
    path: str
    tensors: str
    live: bool
    detail: str


def doctor() -> list[PathStatus]:
    """Both kinds of work on every path, fastest first; builds the C++ operators where they are not built yet.

    Raises nothing: a path that cannot run is a row that says why.
    """
    return [
        PathStatus(work, path, tensors, live, detail)
        for work in ("attention", "selection")
        for path, tensors, (live, detail) in (
            ("triton", "CUDA and ROCm: float32, float16, bfloat16", _triton()),
            ("cpp", "CPU: float32, bfloat16", _cpp()),
            ("torch", "any device: also float64; float16 on the CPU", _torch()),
        )
    ]


def _triton() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA or ROCm device: CPU tensors take the C++ or the torch path."
    reason = why_not("triton", torch.device("cuda"), torch.float32, 64)
    return reason is None, reason or f"{torch.cuda.get_device_name()}, Triton {_triton_version()}"


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _cpp() -> tuple[bool, str]:
    from stream_kernels.cpu import cpu_available

    return cpu_available()


def _torch() -> tuple[bool, str]:
    return True, f"torch {torch.__version__}, {torch.get_num_threads()} threads; the slowest path, where no other runs"

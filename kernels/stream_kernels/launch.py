"""Can a Triton kernel run on these tensors here, and for which architecture should it be configured?"""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# fma of a product and a sum rounds once, not twice: faster and no less exact. Said at every launch because
# Triton's own default is about to change. Triton 3.2 and later take it for CUDA and HIP.
ENABLE_FP_FUSION = True
MOST_REGISTERS = 255  # per thread: all that NVIDIA's instructions can name


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter; it reads the variable when a kernel's module is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not_triton(device: torch.device, dtype: torch.dtype, d_head: int) -> str | None:
    """One sentence that says why the Triton kernels cannot run on such tensors; None when they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: `pip install triton` on Linux, or use the torch or C++ path."
    if device.type not in ("cuda", "cpu"):
        return f"the Triton kernels run on CUDA and ROCm devices, not on '{device.type}': use the torch path."
    if device.type == "cpu" and not interpreting():
        return (
            "the Triton kernels got CPU tensors: move them to a GPU, use the torch or C++ path, or set "
            "TRITON_INTERPRET=1 before the first import to run (slowly) in Triton's interpreter."
        )
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}: convert, or use the torch path."
    if d_head > MAX_HEAD_DIM:
        return f"the Triton kernels take head dimensions up to {MAX_HEAD_DIM}, not {d_head}: use the torch path."
    return None


def require_triton(tensor: Tensor) -> None:
    """Raises RuntimeError with `why_not_triton`'s sentence; `tensor` is [..., d_head]."""
    reason = why_not_triton(tensor.device, tensor.dtype, tensor.shape[-1])
    if reason is not None:
        raise RuntimeError(reason[0].upper() + reason[1:])


def architecture(device: torch.device) -> str:
    """'sm_80', 'sm_90', 'gfx942' …; 'interpreter' for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def register_options(architecture: str) -> dict[str, int]:
    """Left alone, ptxas spills a few registers to fit one more program on a multiprocessor; AMD's compiler does not."""
    return {"maxnreg": MOST_REGISTERS} if architecture.startswith("sm_") else {}


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
    """Launches on `device`. Raises RuntimeError when CPU tensors meet kernels that are not interpreted."""
    import triton.language
    from triton.runtime.jit import JITFunction

    # tl.sum stands for Triton's own library, which also decides at its import how its functions will run.
    if device.type == "cpu" and any(isinstance(function, JITFunction) for function in (kernel, triton.language.sum)):
        raise RuntimeError(
            "TRITON_INTERPRET was set too late: set it before Triton is first imported (transformer_lens imports it)."
        )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, enable_fp_fusion=ENABLE_FP_FUSION)

"""The torch operators of the C++ library: their schemas, and whether they are live."""

from __future__ import annotations

import torch

from stream_kernels.cpu import build

# Schemas exist from import on, so that torch.compile can trace; the C++ library adds the kernels when it loads.
_library = torch.library.Library("stream_lens_cpu", "FRAGMENT")
_state: tuple[bool, str] | None = None


def define(schema: str) -> None:
    """Declares one operator of the C++ library, such as ``"name(Tensor x) -> Tensor"``."""
    _library.define(schema)


def cpu_available() -> tuple[bool, str]:
    """Whether the C++ operators are live, and the reason. The first call builds and loads them; it never raises."""
    global _state
    if _state is None:
        try:
            _state = (True, build.load())
        except build.BuildError as error:
            _state = (False, str(error))
    return _state


# torch.compiler.assume_constant_result, without its import of the compiler: tracing calls this and keeps the answer.
cpu_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require_cpu_operators() -> None:
    """Raises RuntimeError, with the reason, where the C++ operators are not live."""
    live, reason = cpu_available()
    if not live:
        raise RuntimeError(f"the C++ operators are not available: {reason}; use the torch path")

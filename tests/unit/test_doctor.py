"""doctor() tells which paths are live, and why not."""

from __future__ import annotations

import pytest
import torch

from stream_kernels.cpu import library
from stream_lens.doctor import doctor


def test_both_kinds_of_work_on_every_path() -> None:
    rows = doctor()
    assert [(row.work, row.path) for row in rows] == [
        (work, path) for work in ("attention", "selection") for path in ("triton", "cpp", "torch")
    ]
    assert all(row.detail for row in rows)
    assert all(row.live for row in rows if row.path == "torch")


def test_a_path_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_state", (False, "no C++ compiler on the PATH; install one or set CXX"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    by_path = {row.path: row for row in doctor()}
    assert not by_path["cpp"].live
    assert "install one or set CXX" in by_path["cpp"].detail
    assert not by_path["triton"].live
    assert "no CUDA or ROCm device" in by_path["triton"].detail

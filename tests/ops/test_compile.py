"""Every Triton kernel compiles for GPUs that are not here, spills no register and fits their shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compile_all(*options: str, seconds: int) -> subprocess.CompletedProcess[str]:
    """In a fresh process: this one may have Triton's interpreter, which compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_all", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def test_a_few_of_each_fit() -> None:
    done = compile_all("--subset", seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_tile_that_spills_is_found() -> None:
    """The check can fail: four warps are too few for float32 tiles of 32 × 32 × 128."""
    done = compile_all("--sabotage", seconds=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DOES NOT FIT" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("STREAM_LENS_STUDIES"), reason="over 500 compilations: set STREAM_LENS_STUDIES=1 to run them"
)
def test_all_fit() -> None:
    done = compile_all(seconds=4 * 3600)
    assert done.returncode == 0, done.stdout + done.stderr

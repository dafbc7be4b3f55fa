"""What all benchmarks share: interleaved repeats, peak memory, the machine, tables and result files."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stream_lens.files import written_aside

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    median: float
    least: float
    most: float
    repeats: int

    def plain(self) -> dict[str, float]:
        return {"median_s": self.median, "min_s": self.least, "max_s": self.most, "repeats": self.repeats}


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Run all in turn, A B A B …, so that a machine whose speed drifts treats them alike."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s), len(s)) for name, s in seconds.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """How far the process grew above where it stood while `run` ran (Linux: the kernel's own high-water mark)."""
    gc.collect()
    _trim()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = run()
    grown = _status("VmHWM") - before
    del result
    gc.collect()
    return max(grown, 0)


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_results(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """`results/NAME.json`: the machine, what else is said, and the rows."""
    path = RESULTS / f"{name}.json"
    text = json.dumps({"machine": machine(), **more, "rows": rows}, indent=1) + "\n"
    return written_aside(path, lambda aside: aside.write_text(text))


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of equal keys as a table; floats with three digits."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")


def _trim() -> None:
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, so that the mark starts low


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()

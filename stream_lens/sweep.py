"""sweep: one study over many cells (length × depth × k × seed …), in parallel, resumable.

Parallelism is joblib's: processes of this machine by default, Ray or Dask with `joblib.parallel_config`:

    from ray.util.joblib import register_ray
    register_ray()
    with joblib.parallel_config(backend="ray"):
        frame = sweep(loader, cells, study, out="results")

Finished cells are one parquet file each in a folder, written by the calling process, so that a killed sweep goes on
where it stood and workers need no common disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
from joblib.parallel import get_active_backend
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stream_lens.files import written_aside

Cell = Mapping[str, Any]
Study = Callable[[Any, Cell], Mapping[str, Any] | Sequence[Mapping[str, Any]]]

_MODELS: dict[str, Any] = {}
"""This process's model, by the sweep that loaded it: a worker loads once, not once a cell."""


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination: ``grid(length=[1000, 2000], seed=range(5))`` is ten cells."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(
    model_loader: Callable[[], Any],
    cells: Sequence[Cell] | Mapping[str, Sequence[Any]],
    study: Study,
    *,
    out: str | os.PathLike[str],
    n_jobs: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Run ``study(model, cell)`` for every cell that `out` does not hold yet.

    Args:
        model_loader: makes the model, once in each worker. Top-level functions, `functools.partial`s of them and what
            cloudpickle can send will do.
        cells: what to run: a list of cells (see `grid`), or axes to combine. Values must be plain (JSON).
        study: gives one row (a mapping of plain values), or several, for a cell.
        out: folder of the results; cells are told apart by their values, so several sweeps over one study may share it.
        n_jobs: workers, as in joblib: −1 for all cores. Each loads a model of its own, so they must be processes: with
            threads (Dask's too: one thread a worker) they would share one model, which is streamed one way at a time.
        progress: a bar on stderr.

    Returns:
        One row for each row of each cell, the cell's values first, in the order of `cells`.

    Raises:
        ValueError: there are no cells, two are the same, or a cell's values are not plain.
    """
    listed = grid(**cells) if isinstance(cells, Mapping) else [dict(cell) for cell in cells]
    if not listed:
        raise ValueError("there are no cells to run: give at least one, and a value for every axis.")
    names = [cell_name(cell) for cell in listed]
    if len(set(names)) < len(names):
        twice = next(cell for cell, name in zip(listed, names, strict=True) if names.count(name) > 1)
        raise ValueError(f"the cell {twice} is listed twice: every cell must differ.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.parquet" for name in names}
    missing = [(name, cell) for name, cell in zip(names, listed, strict=True) if not files[name].exists()]
    with _bar(progress, len(names)) as advance:
        advance(len(names) - len(missing))
        for name, cell, rows in _run(model_loader, study, missing, n_jobs):
            _write_cell(files[name], cell, rows)
            advance(1)
    return pd.concat([pd.read_parquet(files[name]) for name in names], ignore_index=True)


def cell_name(cell: Cell) -> str:
    """A file name that says nothing but is the same for the same values, whatever their order."""
    try:
        text = json.dumps(dict(sorted(cell.items())), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the cell {cell} has values that are not plain (numbers, text, lists): {error}.") from error
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _run(
    model_loader: Callable[[], Any], study: Study, cells: Sequence[tuple[str, Cell]], n_jobs: int
) -> Iterator[tuple[str, Cell, list[dict[str, Any]]]]:
    """Results as they come; in batches where joblib's backend cannot hand them over one by one."""
    if not cells:
        return
    sweep_id = uuid.uuid4().hex
    tasks = [joblib.delayed(_one)(sweep_id, model_loader, study, name, dict(cell)) for name, cell in cells]
    backend, _ = get_active_backend()
    if backend.supports_return_generator:
        yield from joblib.Parallel(n_jobs=n_jobs, batch_size=1, pre_dispatch="n_jobs", return_as="generator_unordered")(
            tasks
        )
        return
    at_once = max(1, backend.effective_n_jobs(n_jobs))
    for start in range(0, len(tasks), at_once):
        yield from joblib.Parallel(n_jobs=n_jobs, batch_size=1)(tasks[start : start + at_once])


def _one(
    sweep_id: str, model_loader: Callable[[], Any], study: Study, name: str, cell: Cell
) -> tuple[str, Cell, list[dict[str, Any]]]:
    if sweep_id not in _MODELS:
        _MODELS.clear()  # one model at a time: they are large
        _MODELS[sweep_id] = model_loader()
    result = study(_MODELS[sweep_id], cell)
    return name, cell, [dict(row) for row in ([result] if isinstance(result, Mapping) else result)]


def _write_cell(path: Path, cell: Cell, rows: list[dict[str, Any]]) -> None:
    frame = pd.DataFrame([{**cell, **row} for row in rows] if rows else [], columns=None if rows else list(cell))
    written_aside(path, lambda aside: frame.to_parquet(aside, index=False))


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    columns = TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("sweep", total=total)
        yield lambda count: progress.advance(task, count)

"""Sweeps: every cell once, resumed where they stood, the same on processes, Ray and Dask."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import pytest

from stream_lens.sweep import cell_name, grid, sweep

CELLS = grid(length=[8, 16], seed=[0, 1, 2])


def _load(offset: int, log: str) -> int:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    return offset


def _study(model: int, cell: Any) -> dict[str, Any]:
    return {"value": model + cell["length"] * 10 + cell["seed"]}


def _expected() -> list[int]:
    return [100 + cell["length"] * 10 + cell["seed"] for cell in CELLS]


def test_every_cell_is_run_once_and_in_order(tmp_path: Path) -> None:
    log = str(tmp_path / "loads")
    frame = sweep(partial(_load, 100, log), CELLS, _study, out=tmp_path / "out", progress=False)
    assert frame.value.tolist() == _expected()
    assert frame.columns.tolist() == ["length", "seed", "value"]
    assert len(Path(log).read_text().split()) == 1


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    loader = partial(_load, 100, str(tmp_path / "loads"))
    sweep(loader, CELLS[:4], _study, out=out, progress=False)

    def only_new(model: int, cell: Any) -> dict[str, Any]:
        assert cell in CELLS[4:]
        return _study(model, cell)

    assert sweep(loader, CELLS, only_new, out=out, progress=False).value.tolist() == _expected()


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, sys
        from stream_lens.sweep import grid, sweep

        def study(model, cell):
            if cell["seed"] == 2:
                os._exit(9)
            return {"value": cell["seed"]}

        sweep(lambda: 0, {"seed": [0, 1, 2]}, study, out=sys.argv[1], progress=False)
        """
    )
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", script, str(out)], check=False, env=_environment())
    assert killed.returncode == 9
    assert len(list(out.glob("*.parquet"))) == 2
    assert not [path for path in out.iterdir() if path.suffix != ".parquet"]
    frame = sweep(lambda: 0, {"seed": [0, 1, 2]}, lambda _, cell: {"value": cell["seed"]}, out=out, progress=False)
    assert frame.value.tolist() == [0, 1, 2]


def test_several_rows_a_cell(tmp_path: Path) -> None:
    frame = sweep(lambda: 0, {"seed": [0, 1]}, lambda _, cell: [{"row": 0}, {"row": 1}], out=tmp_path, progress=False)
    assert frame.row.tolist() == [0, 1, 0, 1]
    assert frame.seed.tolist() == [0, 0, 1, 1]


def test_processes_give_the_same(tmp_path: Path) -> None:
    log = tmp_path / "loads"
    frame = sweep(partial(_load, 100, str(log)), CELLS, _study, out=tmp_path / "out", n_jobs=2, progress=False)
    assert frame.value.tolist() == _expected()
    loads = log.read_text().split()
    assert len(loads) == len(set(loads)) <= 2  # one model a worker


@pytest.mark.slow
def test_ray_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    from ray.util.joblib import register_ray

    monkeypatch.setenv("PYTHONPATH", _environment()["PYTHONPATH"])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        register_ray()
        with joblib.parallel_config(backend="ray", n_jobs=2):
            frame = sweep(
                lambda: 100,
                CELLS,
                lambda m, c: {"value": m + c["length"] * 10 + c["seed"]},
                out=tmp_path,
                n_jobs=2,
                progress=False,
            )
    finally:
        ray.shutdown()
    assert frame.value.tolist() == _expected()


@pytest.mark.slow
def test_dask_gives_the_same(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra 'dask'")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        frame = sweep(
            lambda: 100,
            CELLS,
            lambda m, c: {"value": m + c["length"] * 10 + c["seed"]},
            out=tmp_path,
            n_jobs=2,
            progress=False,
        )
    assert frame.value.tolist() == _expected()


def test_what_cannot_be_a_cell(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="listed twice"):
        sweep(lambda: 0, [{"a": 1}, {"a": 1}], lambda _, cell: {}, out=tmp_path, progress=False)
    for empty in ([], {"a": []}):
        with pytest.raises(ValueError, match="no cells"):
            sweep(lambda: 0, empty, lambda _, cell: {}, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="not plain"):
        cell_name({"a": object()})
    assert cell_name({"a": 1, "b": 2}) == cell_name({"b": 2, "a": 1})


def test_results_are_parquet_that_pandas_reads(tmp_path: Path) -> None:
    sweep(lambda: 0, [{"a": 1}], lambda _, cell: {"b": None, "c": "x"}, out=tmp_path, progress=False)
    (file,) = tmp_path.glob("*.parquet")
    assert pd.read_parquet(file).to_dict("records") == [{"a": 1, "b": None, "c": "x"}]


def _environment() -> dict[str, str]:
    root = Path(__file__).parent.parent
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}

"""Tutorials: they run, keep their outputs with pictures, agree with their sources, and name no machine."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "tutorials"
NAMES = sorted(path.stem for path in (FOLDER / "source").glob("*.py"))
LARGEST = 2_000_000
MACHINE_PATH = re.compile(r"(?:^|[\s\"'(=:])(/(?:home|root|work|tmp|Users|usr|opt|var)/[\w.]|[A-Z]:\\\\)")

nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed")
pytest.importorskip("jupytext", reason="the extra `notebooks` is not installed")


def _execute() -> ModuleType:
    """tutorials/execute.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("tutorials_execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _notebook(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def _outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_every_notebook_has_a_source() -> None:
    assert NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_its_source(name: str) -> None:
    source, notebook = _execute().notebook_of(FOLDER / "source" / f"{name}.py"), _notebook(name)
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (source, notebook)]
    assert cells[0] == cells[1], f"run: python tutorials/execute.py {name}"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_with_a_picture(name: str) -> None:
    notebook = _notebook(name)
    outputs = _outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture is stored"
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "it was not run from top to bottom"


@pytest.mark.parametrize("name", NAMES)
def test_file_is_small_and_names_no_machine(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    assert not machine_paths(text)
    assert not _execute().named_in(text)


def machine_paths(text: str) -> list[str]:
    """Absolute paths in a notebook's text, pictures (which hold any letters) left out."""
    return MACHINE_PATH.findall(re.sub(r'"image/png": "[^"]*"', "", text))


@pytest.mark.parametrize("text", ["saved in /home/someone/run", 'File "/root/x.py"', "path=/tmp/a", r"C:\\Users"])
def test_machine_paths_are_found(text: str) -> None:
    assert machine_paths(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from stream_lens.demo_models import DEMO_MODELS, DemoModelError, demo_folder

    source = (FOLDER / "source" / f"{name}.py").read_text(encoding="utf-8")
    for model in re.findall(r'^MODEL = "([\w.-]+)"', source, re.MULTILINE):
        try:
            demo_folder(DEMO_MODELS[model])
        except DemoModelError as error:
            pytest.skip(str(error))
    monkeypatch.setenv("STREAM_LENS_SHORT", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    execute = _execute()
    execute.run(execute.notebook_of(FOLDER / "source" / f"{name}.py"))

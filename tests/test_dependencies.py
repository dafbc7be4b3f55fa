"""Whatever the packages import is declared in pyproject.toml, and the pins of CI cover and satisfy what is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OURS = {"stream_lens", "stream_kernels"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def imported(folder: Path) -> dict[str, str]:
    """Top-level names that the modules under `folder` import, each with a file that does; not Python's own."""
    found = {}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {name.split(".")[0]: file.name for name in names}
    return {name: file for name, file in found.items() if name not in OURS | sys.stdlib_module_names}


def undeclared(folder: Path, requirements: dict[str, Requirement]) -> list[str]:
    owners = metadata.packages_distributions()
    missing = []
    for name, file in imported(folder).items():
        distributions = {canonicalize_name(owner) for owner in owners.get(name, [name])}
        if not distributions & set(requirements):
            missing.append(f"{file} imports {name}")
    return missing


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("folder", ["stream_lens", "kernels/stream_kernels"])
def test_every_import_is_declared(folder):
    assert not undeclared(ROOT / folder, declared("notebooks"))  # circuitsvis, imported where it is asked for


def test_an_undeclared_import_is_found(tmp_path):
    (tmp_path / "a.py").write_text("import os\nimport torch.nn\ndef f():\n    from ray.util import q")
    assert undeclared(tmp_path, declared()) == ["a.py imports ray"]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-tl4.txt"])
def test_pins_cover_and_satisfy_what_is_declared(file):
    pinned = pins(file)
    for name, requirement in declared(*PROJECT["optional-dependencies"]).items():
        assert pinned.get(name), f"{file} does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), f"{file}: {name} {pinned[name]} is not {requirement}"


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-tl4.txt"])
def test_pins_name_released_versions_only(file):
    for name, version in pins(file).items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{file}: {name}=={version} is a local build or a path"

"""Imports go one way: stream_kernels, blocks, backend, cache, circuits and tasks, plots, then report, sweep and cli."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first; a part may import its own tier and those below it.
TIERS = (
    {"stream_kernels"},
    {"blocks", "devices", "files"},
    {"backend", "models", "demo_models"},
    {"cache"},
    {"circuits", "tasks"},
    {"plots"},
    {"report", "sweep", "trace", "adapters", "doctor", "cli", "__main__"},
    {"stream_lens"},  # the package itself, which collects the public names
)
RANK = {part: rank for rank, tier in enumerate(TIERS) for part in tier}

# The ways up, only inside a function: a result's .plot() imports its figure, a cache's .save() and .load() the format.
LAZY_WAY_UP = {("circuits", "plots"), ("tasks", "plots"), ("backend", "cache")}

# part → distributions (or parts) that it may not import at all
FORBIDDEN = {
    "stream_kernels": {"transformers", "transformer_lens", "plotly"},
    "blocks": {"transformers", "transformer_lens", "plotly"},
    "backend": {"plotly"},
    "models": {"plotly"},
    "demo_models": {"plotly"},
    "cache": {"plotly"},
    "circuits": {"stream_kernels", "plotly"},
    "tasks": {"stream_kernels", "plotly"},
    "plots": {"stream_kernels"},
    "sweep": {"plotly"},
    "cli": {"plotly"},
    "stream_lens": {"plotly"},
}


class Import(NamedTuple):
    module: str
    line: int
    in_function: bool


def violations(root: Path) -> list[str]:
    """One sentence for every import under `root` that goes against the order."""
    found = []
    for file in sorted([*root.glob("stream_lens/**/*.py"), *root.glob("kernels/stream_kernels/**/*.py")]):
        module = _module_name(file, root)
        importer = _part(module)
        if importer not in RANK:
            found.append(f"{file.relative_to(root)}: {importer} has no place in the order: give it one in TIERS")
            continue
        for used in _imports(file, module):
            reason = _objection(importer, used)
            if reason:
                found.append(f"{file.relative_to(root)}:{used.line} imports {used.module}: {reason}")
    return found


def _objection(importer: str, used: Import) -> str | None:
    imported = _part(used.module)
    if imported in FORBIDDEN.get(importer, ()):
        return f"{importer} may not import {imported}"
    if imported not in RANK or RANK[imported] <= RANK[importer]:
        return None
    if imported == "stream_lens" and RANK[importer] == RANK["cli"]:
        return None  # the outermost tier may use the public names
    if (importer, imported) in LAZY_WAY_UP:
        return None if used.in_function else f"{importer} may import {imported} only inside a function"
    return f"{importer} lies below {imported}"


def _part(module: str) -> str:
    """The part of the project that a module belongs to; for others, the distribution's top name."""
    top, *rest = module.split(".")
    return rest[0] if top == "stream_lens" and rest else top


def _module_name(file: Path, root: Path) -> str:
    inside = file.relative_to(root / "kernels" if (root / "kernels") in file.parents else root)
    parts = inside.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path, module: str) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    in_functions = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = _names_from(node, package)
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, id(node) in in_functions)


def _names_from(node: ast.ImportFrom, package: str) -> list[str]:
    """`from a import b` may import the module a.b: it counts as that where a is the package itself."""
    source = node.module or ""
    if node.level:
        ancestors = package.split(".")
        above = ".".join(ancestors[: len(ancestors) - node.level + 1])
        source = f"{above}.{source}" if source else above
    if source != "stream_lens":
        return [source]
    return [f"stream_lens.{alias.name}" if alias.name in RANK else source for alias in node.names]


def test_imports_go_one_way():
    assert not violations(ROOT)


def _plant(root: Path, file: str, text: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("kernels/stream_kernels/a.py", "import stream_lens", "stream_kernels lies below stream_lens"),
        ("kernels/stream_kernels/op/a.py", "import transformers.utils", "may not import transformers"),
        ("stream_lens/blocks/a.py", "def f():\n    import transformer_lens", "may not import transformer_lens"),
        ("stream_lens/blocks/a.py", "from stream_lens.backend.pattern import P", "blocks lies below backend"),
        ("stream_lens/blocks/a.py", "from ..cache import C", "blocks lies below cache"),
        ("stream_lens/blocks/__init__.py", "from .. import cache", "blocks lies below cache"),
        ("stream_lens/backend/a.py", "from stream_lens import cache", "only inside a function"),
        ("stream_lens/backend/a.py", "def f():\n    import stream_lens.plots.heads", "backend lies below plots"),
        ("stream_lens/cache.py", "import stream_lens as sl", "cache lies below stream_lens"),
        ("stream_lens/circuits/a.py", "def f():\n    from stream_kernels import x", "may not import stream_kernels"),
        ("stream_lens/circuits/a.py", "import plotly.express as px", "may not import plotly"),
        ("stream_lens/circuits/a.py", "from stream_lens.plots import p", "only inside a function"),
        ("stream_lens/plots/a.py", "from stream_lens.report import r", "plots lies below report"),
        ("stream_lens/new_part.py", "import torch", "new_part has no place in the order"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, text, reason):
    _plant(tmp_path, file, text)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:")
    assert reason in found


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("stream_lens/circuits/a.py", "def plot(self):\n    from stream_lens.plots import p"),
        ("stream_lens/circuits/a.py", "from . import segments\nfrom stream_lens.cache import C\nimport torch"),
        ("stream_lens/plots/a.py", "import plotly.graph_objects as go\nfrom stream_lens.circuits import c"),
        ("stream_lens/cli.py", "import stream_lens as sl\nimport stream_kernels"),
    ],
)
def test_what_the_order_allows_is_not_reported(tmp_path, file, text):
    _plant(tmp_path, file, text)
    assert not violations(tmp_path)

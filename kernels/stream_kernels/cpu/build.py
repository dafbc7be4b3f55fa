"""Compiles the C++ operator once per machine kind into the user's cache folder, and loads it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

log = logging.getLogger("stream_kernels.cpu")

SOURCE_FOLDER = Path(__file__).parent
TORCH_FOLDER = Path(torch.__file__).parent  # torch.utils.cpp_extension knows the same paths, but needs setuptools
# torch names the vector instructions it uses here (ATEN_CPU_CAPABILITY included); the operator follows it.
CAPABILITY_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}


class BuildError(RuntimeError):
    """The C++ operator cannot be built or loaded here; the message says why."""


def cache_folder() -> Path:
    """``$STREAM_LENS_CACHE``, else ``$XDG_CACHE_HOME/stream_lens``, else ``~/.cache/stream_lens``."""
    if named := os.environ.get("STREAM_LENS_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stream_lens"


def find_compiler() -> list[str]:
    """The command of ``$CXX``, or of the first of c++, g++ and clang++ on the PATH; raises BuildError without one."""
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        if shutil.which(command[0]):
            return command
        raise BuildError(
            f"CXX names the compiler {named!r}, which is not found; unset CXX or point it at a C++ compiler"
        )
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler on the PATH (c++, g++, clang++); install one or set CXX")


def compile_flags() -> list[str]:
    """Flags of every source file: C++ standard, this CPU's vector instructions, torch's ABI."""
    capability = torch.backends.cpu.get_cpu_capability()
    abi = int(torch.compiled_with_cxx11_abi())
    # No -ffast-math: the kernels rely on infinities. Traps and errno are off, so that comparisons vectorise.
    flags = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    return [*flags, f"-D_GLIBCXX_USE_CXX11_ABI={abi}", *CAPABILITY_FLAGS.get(capability, [])]


def link_flags() -> list[str]:
    """Links torch, and the OpenMP runtime torch itself loaded: a second one would ignore torch.set_num_threads."""
    folder = TORCH_FOLDER / "lib"
    bundled = [*folder.glob("libgomp*.so*"), *(TORCH_FOLDER.parent / "torch.libs").glob("libgomp*.so*")]
    openmp = str(bundled[0]) if bundled else "-fopenmp"
    return [f"-L{folder}", "-ltorch_cpu", "-lc10", openmp]


def build_key(compiler: list[str], sources: list[Path]) -> str:
    """Hash of everything the binary depends on: sources, torch, compiler, flags."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for part in (torch.__version__, *compiler, version, *compile_flags()):
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Lets one process at a time past; released by the system if the process dies."""
    import fcntl  # absent on Windows, where importing this file must still work

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run_compiler(command: list[str]) -> None:
    """Runs one compiler command; raises BuildError with the end of its messages."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(
            f"compiling the C++ operator failed: {' | '.join(errors[:3])} (command: {shlex.join(command)})"
        )


def compile_into(target: Path, compiler: list[str], sources: list[Path]) -> None:
    """Compiles in a temporary sibling folder and moves the finished library to ``target``."""
    headers = TORCH_FOLDER / "include"
    includes = ["-isystem", str(headers), "-isystem", str(headers / "torch" / "csrc" / "api" / "include")]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, *compile_flags(), *includes, "-c", str(source), "-o", str(built)]
            for source, built in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(run_compiler, commands))
        library = Path(folder) / target.name
        run_compiler([*compiler, "-shared", *map(str, objects), *link_flags(), "-o", str(library)])
        os.replace(library, target)


def build() -> Path:
    """The path of the compiled operator, compiled now if the cache lacks it. Raises BuildError."""
    if os.environ.get("STREAM_LENS_NO_COMPILE", "0") not in ("", "0"):
        raise BuildError("STREAM_LENS_NO_COMPILE is set; unset it to let the C++ operator be built and used")
    if sys.platform != "linux":
        raise BuildError(f"the C++ operator is built on Linux only; this is {sys.platform}")
    compiler = find_compiler()
    sources = sorted(SOURCE_FOLDER.glob("*.cpp"))
    folder = cache_folder() / "cpu"
    target = folder / f"stream_lens_cpu-{build_key(compiler, sources + sorted(SOURCE_FOLDER.glob('*.h')))}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / "lock"):
            if not target.exists():
                log.warning("stream_lens: building the CPU operator, once, about 10 s, into %s", target)
                compile_into(target, compiler, sources)
    except OSError as error:
        raise BuildError(f"the C++ operator cannot be built in {folder}: {error}; set STREAM_LENS_CACHE") from error
    return target


def load() -> str:
    """Builds where needed, registers the kernels with torch, and says what was loaded. Raises BuildError."""
    path = build()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"the C++ operator {path} does not load: {error.__cause__ or error}") from error
    return f"C++ operator for {torch.backends.cpu.get_cpu_capability()}, {path}"

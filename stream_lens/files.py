"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def written_aside(target: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """`write` into a file beside `target`, then rename: readers see the old file or the whole new one.

    Makes the folder where it is not there, gives the file the permissions that the user's umask asks for, and leaves
    nothing behind when `write` raises. Returns the target.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        aside.chmod(0o666 & ~_umask())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

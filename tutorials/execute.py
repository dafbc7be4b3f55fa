"""Run the tutorials' sources and keep the results: tutorials/source/NAME.py → tutorials/NAME.ipynb, with pictures.

    python tutorials/execute.py                   # all of them
    python tutorials/execute.py 01_first_steps    # some

Needs the extra `notebooks`, and kaleido with a Chrome or Chromium for the pictures. Cells run with plotly's own output
only; a still picture is added beside it, so that GitHub, which runs no JavaScript, shows the same. What cells write to
stderr (progress bars) goes to the terminal, not into the file. A notebook that names a folder of this machine is not
written.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LARGEST = 2_000_000
"""Bytes of one notebook; beyond that GitHub stops showing it."""
PLOTLY = "application/vnd.plotly.v1+json"
LARGEST_FIGURE = 300_000
"""Bytes of a figure that stays interactive; a larger one is kept as a picture only."""
WIDTH = 1000
"""Pixels of a still picture whose figure does not say."""


def notebook_of(source: Path) -> Any:
    """The notebook without outputs that a percent-format source stands for; its cell ids do not change."""
    import jupytext

    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def run(notebook: Any, timeout: int = 1800) -> Any:
    """The notebook with its outputs. Raises nbclient's CellExecutionError where a cell does."""
    from nbclient import NotebookClient

    before = os.environ.get("PLOTLY_RENDERER")
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    try:
        return NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False).execute()
    finally:
        os.environ.pop("PLOTLY_RENDERER")
        if before is not None:
            os.environ["PLOTLY_RENDERER"] = before


def named_in(text: str) -> list[str]:
    """Folders and the name of this machine that stand in a notebook's text, pictures (any letters) left out."""
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    names = {str(HERE.parent), str(Path.home()), sys.prefix}
    host = socket.gethostname()
    return [name for name in names if len(name) > 1 and name in text] + re.findall(rf"\b{re.escape(host)}\b", text)


def without_stderr(notebook: Any) -> None:
    """Take what cells wrote to stderr out of the outputs and print it here; Ray's own messages come on stdout."""

    def is_noise(output: Any) -> bool:
        return output.get("name") == "stderr" or (output.get("name") == "stdout" and "(raylet)" in output.text)

    for cell in notebook.cells:
        if cell.cell_type == "code":
            for output in filter(is_noise, cell.outputs):
                sys.stderr.write(output.text)
            cell.outputs = [output for output in cell.outputs if not is_noise(output)]


def with_pictures(notebook: Any) -> None:
    """Put a PNG beside every plotly figure, in its place where it is large."""
    import plotly.io as pio

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if PLOTLY in data:
                text = pio.json.to_json_plotly(data[PLOTLY])
                figure = pio.from_json(text, skip_invalid=True)
                picture = figure.to_image("png", width=figure.layout.width or WIDTH)
                data["image/png"] = base64.b64encode(picture).decode()
                if len(text) > LARGEST_FIGURE:
                    del data[PLOTLY]


def main(names: list[str]) -> None:
    import nbformat

    for source in sorted((HERE / "source").glob("*.py")):
        if names and source.stem not in names:
            continue
        start = time.perf_counter()
        notebook = run(notebook_of(source))
        seconds = time.perf_counter() - start
        without_stderr(notebook)
        with_pictures(notebook)
        text = nbformat.writes(notebook) + "\n"
        found = named_in(text)
        if found or len(text.encode()) > LARGEST:
            raise SystemExit(f"{source.stem} was not written: {len(text.encode())} bytes, and it names {found}.")
        (HERE / f"{source.stem}.ipynb").write_text(text, encoding="utf-8")
        print(f"{source.stem}: {seconds:.0f} s, {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])

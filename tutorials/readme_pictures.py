"""Take the README's pictures out of the executed tutorials: docs/pictures/NAME.png.

    python tutorials/readme_pictures.py
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat

HERE = Path(__file__).resolve().parent
PICTURES = HERE.parent / "docs" / "pictures"
CHOSEN = {
    "needle": ("04_needle", r"mask_figure\(", 0),
    "thought_anchors": ("03_thought_anchors", r"mask_figure\(", 0),
}
"""Name of the file: the tutorial, what the cell's source must match, and which of the pictures that match."""


def pictures(notebook: Any, cell_matches: str) -> list[bytes]:
    """The still pictures of the cells whose source matches, in order."""
    return [
        base64.b64decode(output["data"]["image/png"])
        for cell in notebook.cells
        if cell.cell_type == "code" and re.search(cell_matches, cell.source)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, (tutorial, cell_matches, number) in CHOSEN.items():
        notebook = nbformat.read(HERE / f"{tutorial}.ipynb", as_version=4)
        (PICTURES / f"{name}.png").write_bytes(pictures(notebook, cell_matches)[number])


if __name__ == "__main__":
    main()

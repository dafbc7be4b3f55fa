"""Tables on the terminal, and results as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from stream_lens.files import written_aside


def print_frame(console: Console, title: str, frame: pd.DataFrame, *, rows: int = 12) -> None:
    """The first rows of a table; floats with three digits."""
    table = Table(title=title, title_justify="left")
    for name in frame.columns:
        table.add_column(str(name), justify="right", overflow="fold")
    for row in frame.head(rows).itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    if len(frame) > rows:
        console.print(f"… {len(frame) - rows} rows more in the file", style="dim")


def write_result(console: Console, result: Any, out: Path, name: str, *, plot: Any = None) -> None:
    """`name`.csv, .json and .html in `out`."""
    from stream_lens.plots import write_html

    out.mkdir(parents=True, exist_ok=True)
    result.to_frame().to_csv(out / f"{name}.csv", index=False)
    written_aside(out / f"{name}.json", lambda aside: aside.write_text(result.to_json()))
    write_html(result.plot() if plot is None else plot, out / f"{name}.html")
    console.print(f"Files: {out / name}.csv, .json, .html", highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3g}"
    return str(value)

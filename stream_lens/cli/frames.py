"""Tables on the terminal, and results as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from stream_lens.files import written_aside


def plain_console() -> Console:
    """A console that takes answers, labels and names for what they are: "[/INST]" is no markup."""
    return Console(markup=False)


def print_frame(console: Console, title: str, frame: pd.DataFrame, *, rows: int = 12) -> None:
    """The first rows of a table; floats with three digits."""
    table = Table(title=title, title_justify="left")
    for name in frame.columns:
        words = str(name).split("_")
        justify = "left" if words[-1] == "answer" else "right"
        table.add_column("\n".join(words), justify=justify, overflow="fold", min_width=max(map(len, words)))  # type: ignore[arg-type]
    for row in frame.head(rows).itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    if len(frame) > rows:
        console.print(f"… {len(frame) - rows} rows more in the file", style="dim")


def show(
    console: Console, title: str, frame: pd.DataFrame, out: Path, name: str, *, hidden: Sequence[str] = ()
) -> None:
    """Print a table but for its hidden and empty columns, and write all of it to `name`.csv in `out`.

    Answers, which are long, have a table of their own.
    """
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / f"{name}.csv", index=False)
    answers = [column for column in frame.columns if str(column).endswith("answer")]
    print_frame(console, title, frame.drop(columns=[*hidden, *answers]).dropna(axis="columns", how="all"))
    if answers:
        print_frame(console, "What these runs answer, greedily", frame[["run", *answers]])


def title_of(caches: Sequence[Any], model: str | None = None) -> str:
    """Model, T, what was kept and the pruned share of runs, for a table's title."""
    from stream_lens.circuits.reruns import pruned
    from stream_lens.plots.masks import config_text

    info = caches[0].info
    lengths = sorted({mask.kv_len for cache in caches for mask in cache.masks().values()})
    tokens = "–".join(str(length) for length in dict.fromkeys((lengths[0], lengths[-1])))
    choices = "" if info.config is None else f", {info.config.selector}, {config_text(info.config)}"
    share = pruned(caches)["pruned_causal"]
    return f"{model or info.model_name}, T = {tokens}{choices}, {share:.1%} of the causal half pruned"


def write_result(console: Console, result: Any, out: Path, name: str) -> None:
    """`name`.csv, .json and .html in `out`."""
    from stream_lens.plots import write_html

    out.mkdir(parents=True, exist_ok=True)
    result.to_frame().to_csv(out / f"{name}.csv", index=False)
    written_aside(out / f"{name}.json", lambda aside: aside.write_text(result.to_json()))
    write_html(result.plot(), out / f"{name}.html")
    console.print(f"Files: {out / name}.csv, .json, .html", highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)

"""`stream-lens needle`: how often a needle is found, by length, depth, budget and selector, beside the dense model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stream_lens.cli.frames import plain_console
from stream_lens.cli.options import As, KBlock, Model, Out, QBlock, decimals, load, numbers


def needle_command(
    model: Model = "gemma-3-270m",
    as_: As = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens: 1000,2000,4000.")] = "1000,2000",
    depths: Annotated[str, typer.Option(help="Where the needle lies, 0 to 1: 0.1,0.5,0.9.")] = "0.1,0.5,0.9",
    cases: Annotated[int, typer.Option(help="Needles (seeds) for each length and depth.", min=1)] = 4,
    ks: Annotated[str | None, typer.Option("--k", help="Blocks kept for each query block: 8,16.")] = None,
    fractions: Annotated[
        str | None,
        typer.Option("--fraction", help="Shares of the prefix kept: 0.05,0.1. Default when --k is absent: 0.1."),
    ] = None,
    selectors: Annotated[
        str, typer.Option(help="Selectors, compared at the same budget; the last three are the controls.")
    ] = "stream,exhaustive,window_sinks,random",
    task: Annotated[
        str, typer.Option(help="RULER task with a built-in haystack: single_1, multikey_2, multikey_3.")
    ] = "single_1",
    q_block: QBlock = 32,
    k_block: KBlock = 32,
    out: Out = Path("out/needle"),
    jobs: Annotated[int, typer.Option(help="Worker processes; each loads a model of its own.")] = 1,
) -> None:
    """Find the needle: success by length × depth for every budget and selector, and for the dense model.

    Finished cells are kept in --out, so a run that was stopped goes on. Cells that the dense model fails are left out
    of the success rates and counted.
    """
    from stream_lens.plots import needle_heatmap, write_html
    from stream_lens.sweep import sweep
    from stream_lens.tasks.needle_study import needle_cells, needle_study, needle_table

    console = plain_console()
    wanted = numbers(lengths)
    if ks is None and fractions is None:
        fractions = "0.1"
    cells = needle_cells(
        wanted,
        decimals(depths),
        range(cases),
        ks=() if ks is None else numbers(ks),
        fractions=() if fractions is None else decimals(fractions),
        selectors=[name.strip() for name in selectors.split(",")],
        task=task,
        q_block=q_block,
        k_block=k_block,
    )
    cells = [{"model": model, "as": as_, **cell} for cell in cells]  # one folder may hold several models' cells
    console.print(f"{len(cells)} runs; results in {out / 'cells'}", highlight=False)
    loader = partial(load, model, as_, max(wanted) + 64, None)
    frame = sweep(loader, cells, needle_study, out=out / "cells", n_jobs=jobs)
    table = needle_table(frame)
    table.to_frame().to_csv(out / "needle.csv", index=False)
    _print(console, table, frame)
    picture = write_html(needle_heatmap(table), out / "needle.html")
    console.print(f"Table: {out / 'needle.csv'}  Picture: {picture}", highlight=False, soft_wrap=True)


def _print(console: Console, table: Any, frame: Any) -> None:
    from stream_lens.plots.needle import budget_label

    dense = frame[frame.selector == "dense"]
    shown = Table(
        title=f"Needles found; dense finds {int(dense.found.sum())} of n = {len(dense)}", title_justify="left"
    )
    for name in (
        "selector",
        "budget",
        "pruned of\ncausal half",
        "found of those\ndense finds",
        "n",
        "needle kept\nby heads",
    ):
        shown.add_column(name, justify="right")
    for row in table.overall().to_dict("records"):
        success = "dense finds none" if row["n"] == 0 else f"{row['success']:.0%}"
        shown.add_row(
            row["selector"],
            budget_label(row),
            f"{row['pruned_global']:.1%}",
            success,
            str(row["n"]),
            f"{row['needle_kept']:.0%}",
        )
    console.print(shown)

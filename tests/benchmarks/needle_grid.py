"""Needles found by length × depth for every selector and budget, and how much can be pruned before some are lost.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m tests.benchmarks.needle_grid [--cases 10] [--jobs 2]

Gemma 3 270M, every layer pruned. A budget is a share of the blocks of the causal half: spent as one k for all rows, or
as the same share of every row's prefix (`FractionOfPrefix`), with the same total. A case counts as found if every digit
of the answer is the most likely next token after the prompt, a colon and the digits before: one forward a case. Cases
that dense attention fails are counted and left out. Finished cases are kept in a folder, so a run that was stopped goes
on. What `results/needle_grid_cases.parquet` has of a case is not run again, on another machine either; to run more ways
of finished cases, name a new folder.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import stream_lens as sl
from stream_lens.sweep import cell_name, sweep
from tests.benchmarks.measuring import RESULTS, write_results
from tests.benchmarks.needle_budget import DENSE, prompt_and_answer, run_every_layer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FRACTIONS = (0.02, 0.05, 0.1, 0.2)
CASES = RESULTS / "needle_grid_cases.parquet"
FRACTION_SCHEDULE = "stream, fraction of prefix"
SELECTORS = ("stream", FRACTION_SCHEDULE, "exhaustive", "window_sinks", "random")
WAYS = dict.fromkeys(SELECTORS, FRACTIONS)
LONG_WAYS = {**dict.fromkeys(SELECTORS, (0.05,)), "stream": (0.02, 0.05, 0.1), FRACTION_SCHEDULE: (0.02, 0.05)}
"""What is run beyond 8,000 tokens, where a case takes a quarter of an hour."""
BEYOND = 8000
MEASURED = ["found", "log_probability", "pruned", "pruned_global"]

Known = Mapping[tuple[int, float, int], Mapping[tuple[str, float | None], Mapping[str, Any]]]
"""By length, depth and seed of a case, then by selector and share: what an earlier run measured."""


def cells(lengths: tuple[int, ...], once: tuple[int, ...], cases: int) -> list[dict[str, Any]]:
    """The cases, seed by seed, so that a run that was cut short has the same n everywhere; `once` at its end."""
    many = [{"length": n, "depth": depth, "seed": seed} for seed in range(cases) for n in lengths for depth in DEPTHS]
    return many + [{"length": n, "depth": 0.5, "seed": 0} for n in once]


def constant_k(fraction: float, tokens: int, block: int = 32) -> int:
    """The k whose total of kept blocks is nearest to that share of every row's prefix."""
    visible = torch.arange(1, math.ceil(tokens / block) + 1)
    wanted = int(torch.minimum(sl.FractionOfPrefix(fraction, minimum=2).blocks(visible), visible).sum())
    totals = visible.clamp(max=visible[:, None]).sum(1)  # of k = 1, 2, 3 …
    return int((totals - wanted).abs().argmin()) + 1


def config(way: str, fraction: float, tokens: int) -> sl.StreamConfig:
    """How that budget is spent."""
    if way == FRACTION_SCHEDULE:
        return sl.StreamConfig(k=sl.FractionOfPrefix(fraction, minimum=2))
    return sl.StreamConfig(k=max(2, constant_k(fraction, tokens)), selector=way)


def ways(cell: Mapping[str, Any], tokens: int) -> Iterator[tuple[str, float | None, sl.StreamConfig]]:
    """Selector, share and configuration of every run of a case, the dense one first."""
    yield "dense", None, DENSE
    if "constant" in cell:
        yield "stream", None, sl.StreamConfig(k=cell["constant"])
        return
    for selector, fractions in (LONG_WAYS if cell["length"] > BEYOND else WAYS).items():
        for fraction in fractions:
            yield selector, fraction, config(selector, fraction, tokens)


def study(model: Any, cell: Mapping[str, Any], known: Known) -> list[dict[str, Any]]:
    """The dense run, and if it finds the needle every way of pruning; what is known is not run again."""
    ids, digits = prompt_and_answer(model, cell["length"], cell["depth"], cell["seed"])
    before = {} if "constant" in cell else known.get((cell["length"], cell["depth"], cell["seed"]), {})
    listed = list(ways(cell, ids.shape[1]))
    # By configuration: small budgets of short texts come to the same k.
    ran = {str(chosen): before[way, share] for way, share, chosen in listed if (way, share) in before}
    rows: list[dict[str, Any]] = []
    for selector, fraction, chosen in listed:
        name = str(chosen)
        if name not in ran:
            ran[name] = run_every_layer(model, chosen, ids, digits)
        k = chosen.k if isinstance(chosen.k, int) and chosen is not DENSE else None
        rows.append({"selector": selector, "fraction": fraction, "k": k, **ran[name]})
        if not rows[0]["found"]:
            break
    return rows


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Success of every way and budget at every length and depth, of the cases that dense answers."""
    sparse = frame[frame.selector != "dense"]
    keys = ["length", "depth", "selector", "fraction"]
    return (
        sparse.groupby(keys, sort=False, dropna=False)
        .agg(found=("found", "sum"), n=("found", "size"), pruned_global=("pruned_global", "mean"), k=("k", "first"))
        .reset_index()
    )


def stored() -> Known:
    """The cases of the stored file."""
    if not CASES.exists():
        return {}
    frame = pd.read_parquet(CASES)
    fractions = frame.fraction.astype(object).where(frame.fraction.notna(), None)
    measured = frame[MEASURED].to_dict("records")
    known: dict[Any, dict[Any, Any]] = defaultdict(dict)
    for *case, selector, fraction, row in zip(
        frame.length, frame.depth, frame.seed, frame.selector, fractions, measured, strict=True
    ):
        known[tuple(case)][selector, fraction] = row
    return dict(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[1000, 2000, 4000, 8000])
    parser.add_argument(
        "--once", type=int, nargs="*", default=[16000, 32000], help="lengths of one case, in the middle"
    )
    parser.add_argument("--cases", type=int, default=10, help="cases of every length and depth")
    parser.add_argument("--constant", type=int, help="only the search, with this k: a budget between the fractions")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--finished", action="store_true", help="run nothing: sum up the cases that are finished")
    parser.add_argument("--folder", type=Path, default=Path("out/needle_grid"), help="where finished cases are kept")
    options = parser.parse_args()
    longest = max(*options.lengths, *options.once, 0)
    loader = partial(sl.load_model, "gemma-3-270m", as_="hooked", n_ctx=longest + 64, dtype=torch.bfloat16)
    listed = cells(tuple(options.lengths), tuple(options.once), options.cases)
    name = "needle_grid"
    if options.constant:
        listed = [{**cell, "constant": options.constant} for cell in listed]
        name = f"needle_grid_k{options.constant}"
    if options.finished:
        listed = [cell for cell in listed if (options.folder / f"{cell_name(cell)}.parquet").exists()]
    frame = sweep(loader, listed, partial(study, known=stored()), out=options.folder, n_jobs=options.jobs)
    write(frame, name)
    if not options.constant:
        frame.to_parquet(CASES, index=False)


def write(frame: pd.DataFrame, name: str) -> None:
    """The summary as a file, and over depths on the screen."""
    table = summary(frame)
    dense = frame[frame.selector == "dense"].groupby("length").found.agg(["sum", "size"])
    found = [{"length": n, "found": int(row["sum"]), "n": int(row["size"])} for n, row in dense.iterrows()]
    rows = table.astype(object).where(table.notna(), None).to_dict("records")  # JSON has no NaN
    write_results(name, rows, model="gemma-3-270m", dtype="bfloat16", dense=found)
    overall = table.groupby(["length", "selector", "fraction"], sort=False, dropna=False)
    shown = overall.agg(found=("found", "sum"), n=("n", "sum"), pruned_global=("pruned_global", "mean"))
    print(dense.to_string(), shown.reset_index().to_string(index=False), sep="\n")


if __name__ == "__main__":
    main()

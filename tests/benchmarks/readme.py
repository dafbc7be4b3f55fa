"""Write the tables of README.md and docs/selection.md: architectures from the tests' list, figures from `results/`.

python -m tests.benchmarks.readme [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from stream_lens.backend.architectures import TESTED
from tests.benchmarks.measuring import RESULTS

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/selection.md")


def architectures() -> str:
    """The supported bridges."""
    return _markdown(("architecture", "particular about it"), TESTED.items())


def _markdown(headings: Collection[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def figures() -> str:
    """Every result file that has a table here, in order; a file that is missing is left out."""
    parts = []
    for name, table in _TABLES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            parts.append(table(result))
    if not parts:
        return "No figures yet: run the benchmarks (`make bench`)."
    return "\n\n".join(parts)


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"


def _table(title: str, result: dict[str, Any], columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """A title with the machine, and one line a row; `columns` are headings and what stands under them."""
    rows = ([cell(row) for cell in columns.values()] for row in result["rows"])
    return f"{title} ({_where(result)}):\n\n{_markdown(columns, rows)}"


def _number(field: str, form: str = ".1f", unit: str = "") -> Callable[[dict[str, Any]], str]:
    """The field's value, or a dash where it was not measured."""
    return lambda row: "–" if row.get(field) is None else f"{row[field]:{form}}{unit}"


def _run_with_cache(result: dict[str, Any]) -> str:
    return _table(
        "`run_with_cache`, sparse against dense TransformerLens in one process",
        result,
        {
            "model": _number("model", ""),
            "T": _number("T", ","),
            "k": _number("k", ""),
            "sparse": _number("sparse_s", ".2f", " s"),
            "dense": _number("dense_s", ".2f", " s"),
            "times faster": _number("times_faster"),
            "peak sparse": _number("sparse_peak_mb", ",.0f", " MB"),
            "peak dense": _number("dense_peak_mb", ",.0f", " MB"),
            "times less memory": _number("times_less_memory"),
        },
    )


def _attention(result: dict[str, Any]) -> str:
    shown = [row for row in result["rows"] if row["dtype"] == "float32" and 4096 <= row["tokens"] <= 32768]
    return _table(
        f"Attention of one layer, float32, blocks of {shown[0]['block']}, k (3 or more) for 95% of the causal half "
        "pruned: times faster than dense `scaled_dot_product_attention`",
        {**result, "rows": shown},
        {
            "heads / key heads × d_head": _number("shape", ""),
            "T": _number("tokens", ","),
            "k": _number("k", ""),
            "pruned": _number("pruned_of_causal", ".1%"),
            "mask given": _number("times_cpp"),
            "selection included": _number("times_cpp_with_selection"),
            "plain torch path, mask given": _number("times_torch"),
            "compiled flex_attention, same mask": _number("times_flex"),
        },
    )


def _scaling(result: dict[str, Any]) -> str:
    slopes = {
        f"{row['kind']}, {row['shape']}": f"time {row['total_ms']:.2f}, memory {row['total_mib']:.2f}"
        for row in result["slopes"]
        if row["total_ms"] is not None and row["kind"] == "fixed k"
    }
    longest = max(result["rows"], key=lambda row: row["tokens"])
    return (
        f"Growth with T of selection and attention, {min(r['tokens'] for r in result['rows']):,} tokens and more, as "
        f"the exponent of T (1 is linear; {_where(result)}): "
        + "; ".join(f"{name}: {value}" for name, value in slopes.items())
        + f". The longest, {longest['tokens']:,} tokens of {longest['shape']}: {longest['total_ms'] / 1e3:.0f} s and "
        f"{longest['total_mib'] / 1024:.1f} GiB, inputs included."
    )


def _whole_model(result: dict[str, Any]) -> str:
    return _table(
        "A whole forward of Gemma 3 270M with every layer's masks cached, against transformers with SDPA and no masks",
        result,
        {
            "T": _number("T", ","),
            "k": _number("k", ""),
            "pruned of the global layers": _number("pruned_global", ".1%"),
            "sparse": _number("sparse_s", ".1f", " s"),
            "SDPA": _number("dense_s", ".1f", " s"),
            "times faster": _number("times_faster", ".2f"),
            "masks": _number("masks_mb", ".1f", " MB"),
        },
    )


_TABLES = {
    "run_with_cache": _run_with_cache,
    "attention": _attention,
    "attention_b32": _attention,
    "scaling": _scaling,
    "whole_model": _whole_model,
}


def needles() -> str:
    """Needles found by length and budget, a column a way of choosing blocks."""
    path = RESULTS / "needle_grid.json"
    if not path.exists():
        return "Not run yet: `python -m tests.benchmarks.needle_grid`."
    result = json.loads(path.read_text())
    dense = "; ".join(f"{row['found']} of {row['n']} at {row['length']:,}" for row in result["dense"])
    cells: dict[tuple[int, float], dict[str, tuple[int, int]]] = {}
    pruned: dict[tuple[int, float], float] = {}
    for row in result["rows"]:
        where = row["length"], row["fraction"]
        found, n = cells.setdefault(where, {}).get(row["selector"], (0, 0))
        cells[where][row["selector"]] = found + row["found"], n + row["n"]
        if row["selector"] == "stream":
            pruned[where] = row["pruned_global"]
    ways = list(dict.fromkeys(row["selector"] for row in result["rows"]))
    rows = []
    for (length, fraction), found_of in sorted(cells.items()):
        shown = [f"{found_of[way][0]} of {found_of[way][1]}" if way in found_of else "–" for way in ways]
        share = f"{pruned[length, fraction]:.1%}" if (length, fraction) in pruned else "–"
        rows.append([f"{length:,}", f"{fraction:.0%}", share, *shown])
    return f"Dense finds {dense} tokens.\n\n{_markdown(['T', 'share', 'pruned', *ways], rows)}"


_MARKED = {"figures": figures, "architectures": architectures, "needles": needles}


def filled(text: str) -> str:
    """A document's text with the tables between its markers made anew."""
    for name, table in _MARKED.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    check = parser.parse_args().check
    for name in DOCUMENTS:
        now = (ROOT / name).read_text()
        made = filled(now)
        if check and made != now:
            sys.exit(f"{name} is out of date: python -m tests.benchmarks.readme")
        if not check:
            (ROOT / name).write_text(made)


if __name__ == "__main__":
    main()

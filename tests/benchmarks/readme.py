"""Write the README's tables: architectures from the tests' list, figures from the files in `results/`.

python -m tests.benchmarks.readme [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from stream_lens.backend.architectures import TESTED
from tests.benchmarks.measuring import RESULTS

README = Path(__file__).parents[2] / "README.md"


def architectures() -> str:
    """The supported bridges."""
    rows = [f"| {name} | {what} |" for name, what in TESTED.items()]
    return "\n".join(["| architecture | particular about it |", "|---|---|", *rows])


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


def _run_with_cache(result: dict[str, Any]) -> str:
    lines = [
        f"`run_with_cache`, sparse against dense TransformerLens in one process ({_where(result)}):",
        "",
        "| model | T | k | sparse | dense | times faster | peak sparse | peak dense | times less memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['T']:,} | {row['k']} | {row['sparse_s']:.2f} s | {row['dense_s']:.2f} s | "
        f"{row['times_faster']:.1f} | {row['sparse_peak_mb']:,.0f} MB | {row['dense_peak_mb']:,.0f} MB | "
        f"{row['times_less_memory']:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


_TABLES = {"run_with_cache": _run_with_cache}


def filled(text: str) -> str:
    """The README's text with its tables made anew."""
    for name, table in (("figures", figures()), ("architectures", architectures())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    now = README.read_text()
    made = filled(now)
    if parser.parse_args().check:
        sys.exit(0 if made == now else "README.md is out of date: python -m tests.benchmarks.readme")
    README.write_text(made)


if __name__ == "__main__":
    main()

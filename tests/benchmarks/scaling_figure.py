"""The figure of time and memory against T, from the result files of `scaling` and `run_with_cache`.

    python -m tests.benchmarks.scaling_figure [--out FOLDER] [FILE ...]

Files default to `results/run_with_cache.json` and `results/scaling.json`, those that exist; one page a file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from stream_lens.plots import scaling_curve, write_html
from tests.benchmarks.measuring import RESULTS


def scaling_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """T, seconds, bytes and series of the rows of either benchmark; other rows are a ValueError."""
    found = []
    for row in rows:
        if "sparse_peak_mb" in row:
            found += [
                (row["T"], row[f"{side}_s"], 1e6 * row[f"{side}_peak_mb"], f"{row['model']}, {side}")
                for side in ("dense", "sparse")
            ]
        elif "total_ms" in row:
            series = f"{row['shape']}, {row['kind']}"
            found.append((row["tokens"], row["total_ms"] / 1e3, 2**20 * row["total_mib"], series))
        else:
            raise ValueError(f"a row has neither sparse_peak_mb nor total_ms: {sorted(row)}.")
    return pd.DataFrame(found, columns=["T", "seconds", "bytes", "series"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pages")
    options = parser.parse_args()
    usual = [RESULTS / "run_with_cache.json", RESULTS / "scaling.json"]
    for file in options.files or [path for path in usual if path.exists()]:
        result = json.loads(file.read_text())
        where = result["machine"]
        about = f"{where['device']} ({where['cpu']}), {where['threads']} thread(s), torch {where['torch']}"
        figure = scaling_curve(scaling_frame(result["rows"]), f"{file.stem}: T in tokens<br><sup>{about}</sup>")
        print(write_html(figure, options.out / f"{file.stem}.html"))


if __name__ == "__main__":
    main()

"""The needle heatmap: success and n in every cell, and cells where dense fails every case set apart."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from stream_lens.plots import needle_heatmap
from stream_lens.tasks.needle_study import NeedleTable

LENGTHS, DEPTHS = (512, 2048), (0.1, 0.5, 0.9)


def table_of() -> NeedleTable:
    rows = []
    for number, (selector, (k, fraction), length, depth) in enumerate(
        itertools.product(("stream", "window_sinks"), ((8, None), (None, 0.1)), LENGTHS, DEPTHS)
    ):
        fails = (length, depth) == (2048, 0.9)
        n = 0 if fails else 4
        found = number % 5
        rows.append(
            {
                "selector": selector,
                "k": k,
                "fraction": fraction,
                "length": length,
                "depth": depth,
                "success": np.nan if fails else found / 4,
                "n": n,
                "dense_failed": 5 - n,
                "successes_all": found,
                "n_all": 5,
                "pruned_global": 0.5 if k else 0.9,
            }
        )
    return NeedleTable(pd.DataFrame(rows))


def test_cells_hold_success_and_n() -> None:
    frame = table_of().to_frame()
    figure = needle_heatmap(table_of())
    assert len(figure.data) == 2 * 4
    panels = list(itertools.product(("stream", "window_sinks"), (8, None)))
    for (selector, k), (counted, excluded) in zip(
        panels, zip(figure.data[::2], figure.data[1::2], strict=True), strict=True
    ):
        part = frame[(frame.selector == selector) & (frame.k.isna() if k is None else frame.k == k)]
        for row in part.to_dict("records"):
            at = DEPTHS.index(row["depth"]), LENGTHS.index(row["length"])
            if row["n"]:
                assert counted.z[at] == row["success"]
                assert counted.text[at[0]][at[1]] == f"{row['success']:.0%}<br>n = 4"
                assert np.isnan(excluded.z[at])
            else:
                assert np.isnan(counted.z[at])
                assert excluded.text[at[0]][at[1]] == "dense fails<br>5 of 5"
        assert list(counted.x) == ["512", "2,048"]
        assert list(counted.y) == ["10%", "50%", "90%"]


def test_titles_say_selector_budget_pruned_share_and_what_is_left_out() -> None:
    figure = needle_heatmap(table_of(), "Needles")
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [
        "stream, k = 8 (50.0% pruned)",
        "stream, 10% of prefix (90.0% pruned)",
        "window_sinks, k = 8 (50.0% pruned)",
        "window_sinks, 10% of prefix (90.0% pruned)",
    ]
    assert "dense fails 10 of 30 cases" in figure.layout.title.text


def test_shares_that_round_alike_stay_apart() -> None:
    rows = table_of().to_frame().query("k.isna()")
    table = NeedleTable(pd.concat([rows.assign(fraction=0.02), rows.assign(fraction=0.025)]))
    texts = [note.text for note in needle_heatmap(table).layout.annotations]
    assert any(", 2% of prefix" in text for text in texts)
    assert any(", 2.5% of prefix" in text for text in texts)


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        needle_heatmap(NeedleTable(table_of().to_frame().iloc[:0]))

"""Time and memory against T: points as given, slopes as the exponents they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from stream_lens.plots import scaling_curve
from tests.benchmarks.scaling_figure import scaling_frame

LENGTHS = np.array([1024, 2048, 4096, 8192])


def frame_of() -> pd.DataFrame:
    parts = [("sparse", 1.0, 1.0), ("dense", 2.0, 1.5)]
    return pd.concat(
        [
            pd.DataFrame(
                {"T": LENGTHS, "seconds": 1e-6 * LENGTHS**time, "bytes": 8e3 * LENGTHS**memory, "series": name}
            )
            for name, time, memory in parts
        ]
    )


def test_points_and_slopes() -> None:
    frame = frame_of()
    figure = scaling_curve(frame, "toy")
    assert [trace.name for trace in figure.data] == [
        "sparse: slope 1.00",
        "sparse: slope 1.00",
        "dense: slope 2.00",
        "dense: slope 1.50",
    ]
    for trace, field in zip(figure.data, ["seconds", "bytes"] * 2, strict=True):
        part = frame[frame.series == trace.name.split(":")[0]]
        np.testing.assert_array_equal(trace.x, part["T"])
        np.testing.assert_array_equal(trace.y, part[field])
    assert {axis.type for axis in [*figure.select_xaxes(), *figure.select_yaxes()]} == {"log"}
    assert list(figure.layout.xaxis.ticktext) == ["1k", "2k", "4k", "8k"]


def test_what_was_not_measured_is_left_out() -> None:
    frame = frame_of()
    frame.loc[frame.series == "dense", "bytes"] = np.nan
    frame = frame[(frame.series != "dense") | (frame["T"] <= 2048)]
    names = [trace.name for trace in scaling_curve(frame).data]
    assert names == ["sparse: slope 1.00", "sparse: slope 1.00", "dense"]


def test_frames_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="has no column bytes"):
        scaling_curve(frame_of().drop(columns="bytes"))
    with pytest.raises(ValueError, match="has no rows"):
        scaling_curve(frame_of().iloc[:0])


def test_rows_of_both_benchmarks() -> None:
    run = {"model": "toy", "T": 1024, "sparse_s": 1.0, "dense_s": 4.0, "sparse_peak_mb": 5.0, "dense_peak_mb": 50.0}
    layer = {"kind": "fixed k", "shape": "9/3", "tokens": 8192, "total_ms": 250.0, "total_mib": 3.0}
    frame = scaling_frame([run, layer])
    assert frame.series.tolist() == ["toy, dense", "toy, sparse", "9/3, fixed k"]
    assert frame.seconds.tolist() == [4.0, 1.0, 0.25]
    assert frame.bytes.tolist() == [5e7, 5e6, 3 * 2**20]
    with pytest.raises(ValueError, match="neither"):
        scaling_frame([{"T": 1}])

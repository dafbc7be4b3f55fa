"""The schedules of k: their ranges, their files, and the fraction's arithmetic."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stream_lens.blocks import FractionOfPrefix, MassThreshold
from stream_lens.blocks.schedule import schedule_from_json


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FractionOfPrefix(0.0), r"fraction=0.0 is not allowed: give a share in \(0, 1\]"),
        (lambda: FractionOfPrefix(1.5), "fraction=1.5 is not allowed"),
        (lambda: FractionOfPrefix(math.nan), "fraction=nan is not allowed"),
        (lambda: FractionOfPrefix(0.5, minimum=0), "minimum=0 is not allowed: give a whole number of at least 1 block"),
        (lambda: FractionOfPrefix(0.5, minimum=2.5), "minimum=2.5 is not allowed"),  # type: ignore[arg-type]
        (lambda: MassThreshold(-0.1), r"mass=-0.1 is not allowed: give a share in \(0, 1\]"),
        (lambda: MassThreshold(0.9, maximum=0), "maximum=0 is not allowed"),
        (lambda: schedule_from_json({"schedule": "log", "base": 2}), "schedule 'log' is not known: choose one of"),
        (lambda: schedule_from_json({"fraction": 0.5}), "schedule None is not known"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_sentence(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("schedule", [FractionOfPrefix(0.25, minimum=3), MassThreshold(0.9, maximum=12)])
def test_it_survives_a_file(schedule: FractionOfPrefix | MassThreshold) -> None:
    assert schedule_from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@given(st.integers(1, 100), st.integers(1, 5), st.lists(st.integers(0, 40_000), min_size=1, max_size=20))
def test_a_fraction_in_percent_is_rounded_up_exactly(percent: int, minimum: int, visible: list[int]) -> None:
    blocks = FractionOfPrefix(percent / 100, minimum).blocks(torch.tensor(visible))
    expected = [max(minimum, math.ceil(Fraction(percent, 100) * n)) for n in visible]
    assert blocks.tolist() == expected
    assert blocks.dtype == torch.long


def test_floating_point_alone_would_have_rounded_up_one_too_many() -> None:
    """The case that makes the test above worth its name."""
    assert math.ceil(0.07 * 100) == 8
    assert FractionOfPrefix(0.07, 1).blocks(torch.tensor([100])).tolist() == [7]

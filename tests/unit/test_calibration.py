"""The shares of a total budget: as good as trying every division, and refused where there is none."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_lens.blocks.calibration import allocate, recall_curve


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 2), st.floats(0, 1), st.integers(0, 99))
def test_no_other_division_gathers_more(heads, most, fewest, part, seed):
    gains = torch.rand(heads, most, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    curves = gains.sort(-1, descending=True).values.cumsum(-1)
    budget = fewest + part * (most - fewest)
    ks = allocate(curves, budget, fewest)
    total = int(budget * heads)
    assert ks.sum() == total
    assert ks.min() >= fewest
    assert ks.max() <= most

    def gathered(ks):
        return float(sum(curves[head, k - 1] for head, k in enumerate(ks)))

    every = itertools.product(range(fewest, most + 1), repeat=heads)
    assert gathered(ks.tolist()) == pytest.approx(max(gathered(other) for other in every if sum(other) <= total))


def test_a_focused_head_leaves_its_blocks_to_a_diffuse_one():
    focused, diffuse = torch.tensor([0.5, 0.5, 0, 0, 0, 0]), torch.full((6,), 1 / 6)
    assert allocate(torch.stack([focused, diffuse]).cumsum(-1), 4, 2).tolist() == [2, 6]


@pytest.mark.parametrize("budget", [1, 7])
def test_a_budget_outside_what_is_possible_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget={budget} is not allowed: give a mean number of blocks from 2"):
        allocate(torch.rand(2, 6).cumsum(-1), budget, 2)


def test_forced_blocks_come_first_then_the_largest():
    mass = torch.tensor([[[[0.1, 0.0, 0.3, 0.4, 0.2], [0.2, 0.6, 0.1, 0.1, 0.0]]]])
    forced = torch.tensor([[[[True, False, False, False, True], [True, False, False, True, False]]]])
    curve = recall_curve(mass, forced, 6)
    torch.testing.assert_close(curve, torch.tensor([[0.15, 0.3, 0.8, 1.0, 1.0, 1.0]], dtype=torch.float64))

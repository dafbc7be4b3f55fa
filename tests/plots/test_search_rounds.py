"""Rounds of the search: every branch is drawn where it lies, with its score, and survivors are outlined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stream_lens.blocks import StreamConfig, select_blocks
from stream_lens.plots import search_rounds
from stream_lens.plots.theme import COLOURS

T, BLOCK = 500, 8


def searched(**choices):
    q, k = torch.randn(2, 1, 2, T, 16, generator=torch.Generator().manual_seed(0))
    config = StreamConfig(**{"q_block": BLOCK, "k_block": BLOCK, "k": 5, "oversample": 1, **choices})
    return *select_blocks(q, k, config, return_rounds=True), config


@pytest.mark.parametrize("reduce", ["mass", "max"])
def test_branches_scores_and_survivors(reduce: str) -> None:
    mask, rounds, config = searched(reduce=reduce)
    figure = search_rounds(mask, rounds, config, q_block=40, head=1)
    (branches,) = [bars for bars in figure.data if bars.name == "branch"]
    drawn = {
        (int(y), int(base), int(base + width)): (score, outline == COLOURS["red"])
        for y, base, width, score, outline in zip(
            branches.y, branches.base, branches.x, branches.marker.color, branches.marker.line.color, strict=True
        )
    }
    expected = {}
    for number, state in enumerate(rounds):
        parts = (part[0, 1, 40].tolist() for part in (state.start, state.stop, state.score, state.survives))
        for start, stop, score, survives in zip(*parts, strict=True):
            if stop > start:
                shown = score if reduce == "max" else np.log10(score)
                expected[number, start * BLOCK, min(stop * BLOCK, T)] = (pytest.approx(shown, abs=1e-5), survives)
    assert drawn == expected
    assert len(expected) == len(branches.x)


def test_the_lowest_row_is_what_the_mask_keeps() -> None:
    mask, rounds, config = searched(oversample=3, k=4)
    figure = search_rounds(mask, rounds, config, q_block=-1)
    kept = {bars.name: [int(x) for x in bars.customdata] for bars in figure.data if bars.name.startswith("kept")}
    blocks = mask.indices[0, 0, -1]
    assert sorted(block for part in kept.values() for block in part) == blocks[blocks >= 0].tolist()
    assert kept["kept without a search"] == [0, mask.k_blocks - 1]
    assert figure.layout.yaxis.ticktext[-1] == "kept"


def test_title_says_where_and_how_much() -> None:
    mask, rounds, config = searched()
    title = search_rounds(mask, rounds, config, q_block=-1, head=1, title="Toy, layer 3").layout.title.text
    pruned = mask.select(heads=[1]).sparsity("causal")
    for part in ("Toy, layer 3", "head 1", "query block 62", "496 to 499", "T = 500", "k = 5", f"{pruned:.1%}"):
        assert part in title


def test_padding_is_drawn_as_unseen_not_lost() -> None:
    mask, rounds, config = searched()
    rounds[0].score[0, 0, 40, :2] = -torch.inf
    figure = search_rounds(mask, rounds, config, q_block=40)
    (unseen,) = [bars for bars in figure.data if bars.name == "seen by no row"]
    assert len(unseen.x) == 2


def test_no_rounds_and_no_such_block() -> None:
    mask, rounds, config = searched(k=70)
    with pytest.raises(ValueError, match="had no rounds"):
        search_rounds(mask, rounds, config, q_block=0)
    mask, rounds, config = searched()
    with pytest.raises(ValueError, match="query block 63 is not there: the mask has 63"):
        search_rounds(mask, rounds, config, q_block=63)

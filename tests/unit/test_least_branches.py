"""However few blocks a row may keep, enough branches compete for them."""

from __future__ import annotations

import pytest
import torch

from stream_lens.blocks import FractionOfPrefix, ScoreRule, StreamConfig, select_blocks
from stream_lens.blocks.selection import LEAST_FREE, prepared, with_enough_branches


@pytest.mark.parametrize(("free", "oversample"), [(0, 24), (1, 24), (2, 12), (3, 8), (4, 6), (5, 6), (100, 6)])
def test_oversample_is_raised_where_few_blocks_are_free(free: int, oversample: int) -> None:
    config = with_enough_branches(StreamConfig(), free)
    assert config.oversample == oversample
    assert config.oversample * max(1, free) >= LEAST_FREE * 6
    assert with_enough_branches(StreamConfig(oversample=1), free).oversample == 1  # the paper's form
    assert with_enough_branches(StreamConfig(oversample=2), free).oversample == {0: 8, 1: 8, 2: 4, 3: 3}.get(free, 2)


def test_a_row_that_may_keep_more_than_others_counts() -> None:
    q = k = torch.randn(1, 1, 1024, 8)
    rule = ScoreRule(8**-0.5)
    assert prepared(q, k, rule, StreamConfig(q_block=8, k_block=8, k=3), 0).config.oversample == 24
    schedule = StreamConfig(q_block=8, k_block=8, k=FractionOfPrefix(0.05, minimum=2))  # up to 7 of 128 blocks
    assert prepared(q, k, rule, schedule, 0).config.oversample == 6


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_one_free_block_goes_to_the_oracles_choice_where_all_compete(kernel: str) -> None:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 8 * (6 * LEAST_FREE + 2), 16, generator=random) for _ in range(2))
    config = StreamConfig(q_block=8, k_block=8, k=3, query_stride=1)
    found = select_blocks(q, k, config, kernel=kernel)  # type: ignore[arg-type]
    oracle = select_blocks(q, k, StreamConfig(q_block=8, k_block=8, k=3, selector="exhaustive"))
    assert torch.equal(found.indices.sort(-1).values, oracle.indices.sort(-1).values)

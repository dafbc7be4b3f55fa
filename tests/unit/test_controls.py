"""The selectors that the search is compared with: what they must keep, from scores made one row and key at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import BlockMask, StreamConfig, select_blocks


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """q, k, config and rule of one layer; forced blocks are the sink block (if any) and the diagonal."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch, kv_heads, groups = (draw(st.integers(1, 2)) for _ in range(3))
    q_len, past = draw(st.integers(1, 40)), draw(st.integers(0, 20))
    config = StreamConfig(
        q_block=draw(st.integers(1, 6)),
        k_block=draw(st.integers(2, 6)),
        k=99,
        rank=draw(st.sampled_from(["max", "mass", "peak"])),
        sink_blocks=draw(st.integers(0, 1)),
        query_stride=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 99)),
    )
    rule = ScoreRule(0.7, past, draw(st.none() | st.integers(1, 30)), draw(st.none() | st.floats(2.0, 30.0)))
    return {
        "q": torch.randn(batch, kv_heads * groups, q_len, 4, generator=random, dtype=torch.float64),
        "k": torch.randn(batch, kv_heads, past + q_len, 4, generator=random, dtype=torch.float64),
        "config": config.with_k(config.forced_blocks + draw(st.integers(0, 4))),
        "rule": rule,
    }


def regions(mask: BlockMask, i: int, config: StreamConfig) -> tuple[set[int], list[int]]:
    """Forced blocks of query block i, and the blocks between them that compete, oldest first."""
    first_row = mask.offset + i * mask.q_block
    last_row = min(first_row + mask.q_block, mask.offset + mask.q_len) - 1
    oldest = 0 if mask.window is None else max(0, first_row - mask.window + 1)
    seen = range(oldest // mask.k_block, last_row // mask.k_block + 1)
    forced = {n for n in seen if n >= first_row // mask.k_block or n < config.sink_blocks}
    return forced, [n for n in seen if n not in forced]


def pattern_of(q: Tensor, k: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Dense scores (hidden keys -inf) and their softmax."""
    scores = rule.scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    row, key = rule.offset + torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    hidden = (key > row) if rule.window is None else (key > row) | (key <= row - rule.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores, scores.softmax(-1)


@settings(max_examples=100)
@given(cases())
def test_the_oracle_keeps_the_best_blocks_of_the_dense_pattern(case: dict[str, Any]) -> None:
    config = replace(case["config"], selector="exhaustive")
    mask = select_blocks(case["q"], case["k"], config, case["rule"])
    scores, pattern = pattern_of(case["q"], case["k"], case["rule"])
    for b, h, i in torch.cartesian_prod(*map(torch.arange, mask.indices.shape[:3])).tolist():
        forced, between = regions(mask, i, config)
        free = max(0, int(config.k) - len(forced))  # type: ignore[arg-type]
        rows = slice(i * mask.q_block, (i + 1) * mask.q_block)

        def value(block: int, b: int = b, h: int = h, rows: slice = rows) -> float:
            keys = slice(block * mask.k_block, (block + 1) * mask.k_block)
            if config.rank == "max":
                return float(scores[b, h, rows, keys].max())
            share = pattern[b, h, rows, keys].sum(-1)
            return float(share.sum() if config.rank == "mass" else share.max())

        best = sorted(between, key=lambda block: (-value(block), block))[:free]
        kept = {block for block in mask.indices[b, h, i].tolist() if block >= 0}
        assert kept == forced | set(best)


@settings(max_examples=100)
@given(cases())
def test_window_sinks_keeps_the_nearest_blocks(case: dict[str, Any]) -> None:
    config = replace(case["config"], selector="window_sinks")
    mask = select_blocks(case["q"], case["k"], config, case["rule"])
    for b, h, i in torch.cartesian_prod(*map(torch.arange, mask.indices.shape[:3])).tolist():
        forced, between = regions(mask, i, config)
        free = max(0, int(config.k) - len(forced))  # type: ignore[arg-type]
        kept = {block for block in mask.indices[b, h, i].tolist() if block >= 0}
        assert kept == forced | set(between[len(between) - min(free, len(between)) :])


@settings(max_examples=40)
@given(cases())
def test_random_depends_on_the_seed_and_not_on_q_and_k(case: dict[str, Any]) -> None:
    config = replace(case["config"], selector="random")
    mask = select_blocks(case["q"], case["k"], config, case["rule"])
    assert mask.equal(select_blocks(torch.zeros_like(case["q"]), torch.zeros_like(case["k"]), config, case["rule"]))


def test_random_leaves_the_global_generator_alone_and_heads_differ() -> None:
    q = torch.zeros(2, 3, 256, 4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = StreamConfig(8, 8, 6, selector="random")
    mask = select_blocks(q, q, config)
    assert torch.equal(torch.get_rng_state(), before)
    rows = {str(mask.indices[b, h].tolist()) for b in range(2) for h in range(3)}
    assert len(rows) == 6
    assert not mask.equal(select_blocks(q, q, replace(config, seed=1)))


def test_random_draws_every_block_equally_often() -> None:
    """The last of 64 query blocks draws 4 of 62: each block's count over 2,000 heads is binomial."""
    q = torch.zeros(1, 2000, 256, 1)
    mask = select_blocks(q, q, StreamConfig(4, 4, 6, selector="random"))
    counts = torch.bincount(mask.indices[0, :, -1].flatten().long(), minlength=64)
    assert counts[0] == counts[63] == 2000
    share = 4 / 62
    spread = math.sqrt(2000 * share * (1 - share))
    assert ((counts[1:63] - 2000 * share).abs() < 5 * spread).all()


@pytest.mark.parametrize("selector", ["exhaustive", "window_sinks", "random"])
def test_all_spend_the_same_budget_as_the_search(selector: str) -> None:
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 300, 8, generator=random), torch.randn(1, 1, 300, 8, generator=random)
    config = StreamConfig(8, 8, 7)
    stream, control = (select_blocks(q, k, replace(config, selector=name)) for name in ("stream", selector))
    assert torch.equal(stream.kept.sum(-1), control.kept.sum(-1))


def test_the_oracle_test_would_notice_a_search_that_misses() -> None:
    """The search itself is no oracle: on random keys it keeps other blocks."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 300, 8, generator=random), torch.randn(1, 1, 300, 8, generator=random)
    config = StreamConfig(8, 8, 7)
    assert not select_blocks(q, k, config).equal(select_blocks(q, k, replace(config, selector="exhaustive")))

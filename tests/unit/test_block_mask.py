"""BlockMask against Python sets of (batch, head, query block, key block), and against dense counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_lens.blocks import BlockMask


@dataclass(frozen=True)
class Layout:
    """Sizes of one pattern. `past` queries stand before the first row, `beyond` keys after the last."""

    batch: int
    heads: int
    q_len: int
    past: int
    beyond: int
    q_block: int
    k_block: int
    window: int | None

    @property
    def kv_len(self) -> int:
        return self.past + self.q_len + self.beyond

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.q_block)

    def seen(self, query_block: int, *, window: bool = True) -> list[int]:
        """Key blocks of which some row of the query block sees a key."""
        blocks = set()
        for row in range(query_block * self.q_block, min((query_block + 1) * self.q_block, self.q_len)):
            position = self.past + row
            first = max(0, position - self.window + 1) if window and self.window is not None else 0
            blocks |= {key // self.k_block for key in range(first, position + 1)}
        return sorted(blocks)


layouts = st.builds(
    Layout,
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    q_len=st.integers(1, 24),
    past=st.integers(0, 12),
    beyond=st.integers(0, 7),
    q_block=st.integers(1, 8),
    k_block=st.integers(1, 8),
    window=st.none() | st.integers(1, 20),
)

Row = tuple[int, int, int]


@st.composite
def kept_blocks(draw: st.DrawFn, layout: Layout) -> dict[Row, set[int]]:
    """Any subset of the visible blocks for each (batch, head, query block)."""
    return {
        (b, h, i): set(draw(st.lists(st.sampled_from(layout.seen(i)), max_size=6)))
        for b in range(layout.batch)
        for h in range(layout.heads)
        for i in range(layout.q_blocks)
    }


def mask_of(layout: Layout, kept: dict[Row, set[int]], spare: int = 0) -> BlockMask:
    """The mask that keeps these blocks, with `spare` slots that nothing uses."""
    width = max(1, max(map(len, kept.values()), default=0)) + spare
    indices = torch.full((layout.batch, layout.heads, layout.q_blocks, width), -1, dtype=torch.int32)
    for (b, h, i), blocks in kept.items():
        for slot, block in enumerate(sorted(blocks)):
            indices[b, h, i, slot] = block
    return BlockMask(
        indices, layout.q_block, layout.k_block, layout.q_len, layout.kv_len, layout.past, layout.window
    ).check()


def sets_of(mask: BlockMask) -> dict[Row, set[int]]:
    """Back to sets; asserts the format: ascending, no block twice, -1 last."""
    found = {}
    for b, h, i in torch.cartesian_prod(*map(torch.arange, mask.indices.shape[:3])).tolist():
        row = mask.indices[b, h, i].tolist()
        blocks = [block for block in row if block >= 0]
        assert row == sorted(set(blocks)) + [-1] * (len(row) - len(blocks))
        found[b, h, i] = set(blocks)
    return found


def dense_of(layout: Layout, kept: dict[Row, set[int]]) -> Tensor:
    """Bool [batch, head, query, key], one entry at a time."""
    dense = torch.zeros(layout.batch, layout.heads, layout.q_len, layout.kv_len, dtype=torch.bool)
    for (b, h, i), blocks in kept.items():
        for row in range(i * layout.q_block, min((i + 1) * layout.q_block, layout.q_len)):
            for key in range(layout.kv_len):
                position = layout.past + row
                visible = key <= position and (layout.window is None or key > position - layout.window)
                dense[b, h, row, key] = visible and key // layout.k_block in blocks
    return dense


@st.composite
def layout_and_kept(draw: st.DrawFn, count: int = 1) -> tuple[Any, ...]:
    layout = draw(layouts)
    return (layout, *(draw(kept_blocks(layout)) for _ in range(count)))


@settings(max_examples=150)
@given(layout_and_kept(2), st.integers(0, 2), st.integers(0, 2))
def test_algebra_is_that_of_sets(case, spare_a: int, spare_b: int) -> None:
    layout, one, two = case
    a, b = mask_of(layout, one, spare_a), mask_of(layout, two, spare_b)
    for both, expected in [
        (a & b, {row: one[row] & two[row] for row in one}),
        (a | b, {row: one[row] | two[row] for row in one}),
        (a - b, {row: one[row] - two[row] for row in one}),
        (a ^ b, {row: one[row] ^ two[row] for row in one}),
    ]:
        assert sets_of(both) == expected
        assert both.k == max(1, *map(len, expected.values())), "slots that no row uses are cut off"
        assert both.indices.dtype == torch.int32
        assert both.check() is both
    assert a.equal(b) == (one == two)
    assert a.equal(mask_of(layout, one, spare=3))
    assert (a ^ a).kept.sum() == 0


@settings(max_examples=150)
@given(layout_and_kept(), st.integers(0, 2))
def test_to_dense_and_back(case, spare: int) -> None:
    layout, kept = case
    mask = mask_of(layout, kept, spare)
    dense = dense_of(layout, kept)
    assert torch.equal(mask.to_dense(), dense)
    assert tuple(dense.shape) == mask.shape
    back = BlockMask.from_dense(dense, layout.q_block, layout.k_block, layout.past, layout.window)
    assert back.equal(mask)
    assert back.k == max(1, *map(len, kept.values()))


@settings(max_examples=100)
@given(layout_and_kept(), st.data())
def test_to_dense_of_some_rows_and_heads(case, data: st.DataObject) -> None:
    layout, kept = case
    dense = dense_of(layout, kept)
    ends = st.none() | st.integers(-layout.q_len, layout.q_len)
    rows = slice(data.draw(ends), data.draw(ends), data.draw(st.none() | st.integers(1, 3)))
    heads = data.draw(st.lists(st.integers(0, layout.heads - 1), min_size=1, max_size=3))
    mask = mask_of(layout, kept)
    assert torch.equal(mask.to_dense(rows=rows), dense[:, :, rows])
    assert torch.equal(mask.to_dense(heads=heads), dense[:, heads])
    assert torch.equal(mask.to_dense(rows, slice(0, 1)), dense[:, :1, rows])


@settings(max_examples=100)
@given(layout_and_kept(), st.data())
def test_select_cuts_out_what_slicing_the_dense_mask_does(case, data: st.DataObject) -> None:
    layout, kept = case
    start = data.draw(st.integers(0, layout.q_blocks - 1))
    stop = data.draw(st.integers(start + 1, layout.q_blocks + 2))
    heads = data.draw(st.lists(st.integers(0, layout.heads - 1), min_size=1, max_size=3))
    part = mask_of(layout, kept).select(slice(0, 1), heads, slice(start, stop))
    rows = slice(start * layout.q_block, stop * layout.q_block)
    assert torch.equal(part.to_dense(), dense_of(layout, kept)[:1, heads, rows])
    assert part.offset == layout.past + start * layout.q_block


def test_select_of_no_query_block_is_empty_and_prints() -> None:
    empty = BlockMask(torch.zeros(1, 1, 2, 1, dtype=torch.int32), 4, 4, 8, 8).select(q_blocks=slice(5, None))
    assert empty.shape == (1, 1, 0, 8)
    assert empty.sparsity() == 0.0
    assert "BlockMask([1, 1, 0, 8]" in repr(empty)


@settings(max_examples=100)
@given(layout_and_kept())
def test_sparsity_is_the_share_of_blocks_not_kept(case) -> None:
    layout, kept = case
    mask = mask_of(layout, kept)
    count = sum(map(len, kept.values())) / (layout.batch * layout.heads)
    blocks = range(layout.q_blocks)
    causal = sum(len(layout.seen(i, window=False)) for i in blocks)
    visible = sum(len(layout.seen(i)) for i in blocks)
    assert mask.sparsity("causal") == mask.sparsity() == pytest.approx(1 - count / causal)
    assert mask.sparsity("visible") == pytest.approx(1 - count / visible)
    assert mask.sparsity("full") == pytest.approx(1 - count / (layout.q_blocks * -(-layout.kv_len // layout.k_block)))
    assert mask.nbytes == 4 * mask.indices.numel()


@settings(max_examples=100)
@given(layout_and_kept(), st.data())
def test_contains_answers_for_any_list_of_blocks(case, data: st.DataObject) -> None:
    layout, kept = case
    mask = mask_of(layout, kept, data.draw(st.integers(0, 1)))
    asked = st.lists(st.integers(-1, 99), min_size=3, max_size=3)
    rows = [data.draw(asked) for _ in kept]
    blocks = torch.tensor(rows, dtype=torch.int64).view(layout.batch, layout.heads, layout.q_blocks, 3)
    answers = mask.contains(blocks).view(-1, 3).tolist()
    expected = [[block in kept[row] for block in asked] for row, asked in zip(kept, rows, strict=True)]
    assert answers == expected


def test_contains_without_a_slot() -> None:
    mask = BlockMask(torch.zeros(1, 1, 2, 0, dtype=torch.int32), 4, 4, 8, 8)
    assert mask.contains(torch.zeros(1, 1, 2, 3, dtype=torch.int32)).sum() == 0
    assert mask.k == 0


@settings(max_examples=60)
@given(layout_and_kept(), st.data())
def test_where_keeps_the_marked_slots(case, data: st.DataObject) -> None:
    layout, kept = case
    mask = mask_of(layout, kept)
    seed = data.draw(st.integers(0, 99))
    marked = torch.rand(mask.indices.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = {
        (b, h, i): {
            block for block, take in zip(mask.indices[b, h, i].tolist(), marked[b, h, i].tolist(), strict=True) if take
        }
        - {-1}
        for b, h, i in kept
    }
    assert sets_of(mask.where(marked)) == expected


def test_equal_needs_the_same_tokens_and_window() -> None:
    mask = BlockMask(torch.zeros(1, 1, 2, 1, dtype=torch.int32), 4, 4, 8, 8)
    assert mask.equal(replace(mask))
    assert not mask.equal(replace(mask, window=4))
    assert not mask.equal(replace(mask, kv_len=12))
    assert not mask.equal(replace(mask, kv_len=12, offset=4))


GOOD = torch.tensor([[[[0, -1], [0, 1]]]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": GOOD.long()}, "indices must be int32 of shape .batch, head, q_blocks, k.; got torch.int64"),
        ({"indices": GOOD[0]}, r"got torch.int32 of shape \(1, 2, 2\)"),
        ({"indices": GOOD[:, :, :1]}, "8 queries in blocks of 4 make 2 query blocks; indices has 1"),
        ({"q_block": 0}, "q_block=0 is not allowed: give at least 1"),
        ({"k_block": -1}, "k_block=-1 is not allowed"),
        ({"q_len": -8}, "q_len=-8 is not allowed: give at least 0"),
        ({"offset": -1}, "offset=-1 is not allowed"),
        ({"window": 0}, "window=0 is not allowed: give at least 1"),
        ({"offset": 1}, "8 queries from position 1 end after the 8 keys"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    good: dict[str, Any] = {"indices": GOOD, "q_block": 4, "k_block": 4, "q_len": 8, "kv_len": 8}
    BlockMask(**good)
    with pytest.raises(ValueError, match=message):
        BlockMask(**{**good, **change})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, -1], [0, 2]], r"query block 1 \(batch 0, head 0\) keeps key block 2: blocks 0 to 1 begin before"),
        ([[1, -1], [0, 1]], r"query block 0 \(batch 0, head 0\) keeps key block 1: blocks 0 to 0 begin before"),
        ([[0, -1], [-2, 1]], "keeps key block -2: .*use -1 for an empty slot"),
        ([[0, -1], [1, 0]], r"query block 1 \(batch 0, head 0\) keeps \[1, 0\]: give each block once, in ascending"),
        ([[0, -1], [1, 1]], r"keeps \[1, 1\]"),
        ([[-1, 0], [0, 1]], r"query block 0 \(batch 0, head 0\) keeps \[-1, 0\]: .*empty slots \(-1\) last"),
    ],
)
def test_check_names_the_first_bad_row(rows: list, message: str) -> None:
    mask = BlockMask(torch.tensor([[rows]], dtype=torch.int32), 4, 4, 8, 8)
    with pytest.raises(ValueError, match=message):
        mask.check()


def test_masks_of_other_tokens_do_not_combine() -> None:
    mask = BlockMask(GOOD, 4, 4, 8, 8)
    with pytest.raises(ValueError, match=r"combine only over the same tokens and blocks; got BlockMask.* at offset 0"):
        mask & replace(mask, window=4)
    with pytest.raises(TypeError, match="unsupported operand"):
        mask & 3  # type: ignore[operator]


def test_other_errors_say_what_is_allowed() -> None:
    mask = BlockMask(GOOD, 4, 4, 8, 8)
    with pytest.raises(ValueError, match="of='all' is not known: choose one of causal, full, visible"):
        mask.sparsity("all")
    with pytest.raises(ValueError, match="with step 1 only; got step 2"):
        mask.select(q_blocks=slice(0, 2, 2))


def test_from_dense_refuses_what_a_causal_mask_cannot_hold() -> None:
    full = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"keys that a row at offset 0 with window None cannot see"):
        BlockMask.from_dense(full, 4, 4)
    with pytest.raises(ValueError, match="with window 4 cannot see"):
        BlockMask.from_dense(full.tril(), 4, 4, window=4)
    with pytest.raises(ValueError, match=r"a dense mask is bool \[batch, head, query, key\]; got torch.float32"):
        BlockMask.from_dense(full.tril().float(), 4, 4)
    assert BlockMask.from_dense(full.tril(), 4, 4).equal(BlockMask(GOOD, 4, 4, 8, 8))


def test_the_format_check_of_these_tests_can_fail() -> None:
    for row in ([1, 0], [0, 0], [-1, 1]):
        mask = BlockMask(torch.tensor([[[row, row]]], dtype=torch.int32), 4, 4, 8, 8)
        with pytest.raises(AssertionError):
            sets_of(mask)

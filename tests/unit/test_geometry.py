"""Which blocks are visible and which are forced, against a count over single rows and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import StreamConfig
from stream_lens.blocks.geometry import BlockRanges, block_ranges


@dataclass(frozen=True)
class Layout:
    """One attention's sizes, and how many keys of each batch row are padding on the left and on the right."""

    q_len: int
    past: int
    beyond: int
    q_block: int
    k_block: int
    window: int | None
    sinks: int
    local: int
    padding: list[tuple[int, int]]

    @property
    def kv_len(self) -> int:
        return self.past + self.q_len + self.beyond

    @property
    def key_mask(self) -> torch.Tensor:
        key = torch.arange(self.kv_len)
        return torch.stack([(key >= left) & (key < self.kv_len - right) for left, right in self.padding])


layouts = st.builds(
    Layout,
    q_len=st.integers(1, 40),
    past=st.integers(0, 20),
    beyond=st.integers(0, 9),
    q_block=st.integers(1, 9),
    k_block=st.integers(1, 9),
    window=st.none() | st.integers(1, 30),
    sinks=st.integers(0, 3),
    local=st.integers(0, 3),
    padding=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3),
)


def seen_blocks(layout: Layout, b: int, query_block: int) -> set[int]:
    """Key blocks of which some row of the query block sees a key: one row and one key at a time."""
    left, right = layout.padding[b]
    seen = set()
    for row in range(query_block * layout.q_block, min((query_block + 1) * layout.q_block, layout.q_len)):
        position = layout.past + row
        for key in range(layout.kv_len):
            causal = key <= position
            inside = layout.window is None or key > position - layout.window
            real = left <= key < layout.kv_len - right
            if causal and inside and real:
                seen.add(key // layout.k_block)
    return seen


def ranges_of(layout: Layout) -> BlockRanges:
    return block_ranges(
        ScoreRule(1.0, layout.past, layout.window, key_mask=layout.key_mask),
        layout.q_len,
        layout.kv_len,
        StreamConfig(layout.q_block, layout.k_block, 99, sink_blocks=layout.sinks, local_blocks=layout.local),
        batch=len(layout.padding),
        device="cpu",
    )


@settings(max_examples=300)
@given(layouts)
def test_ranges_hold_what_some_row_sees_and_nothing_else(layout: Layout) -> None:
    ranges = ranges_of(layout)
    for b in range(len(layout.padding)):
        for i in range(-(-layout.q_len // layout.q_block)):
            visible = set(range(int(ranges.first[b, i]), int(ranges.stop[b, i])))
            assert visible == seen_blocks(layout, b, i)


@settings(max_examples=300)
@given(layouts)
def test_sinks_are_the_first_real_blocks_and_local_ones_lead_up_to_the_diagonal(layout: Layout) -> None:
    ranges = ranges_of(layout)
    for b, (left, _) in enumerate(layout.padding):
        for i in range(-(-layout.q_len // layout.q_block)):
            seen = seen_blocks(layout, b, i)
            first_row = (layout.past + i * layout.q_block) // layout.k_block
            local = {block for block in seen if block >= first_row - layout.local}
            real = left // layout.k_block
            sinks = {block for block in seen if real <= block < real + layout.sinks} - local
            assert set(range(int(ranges.local_start[b, i]), int(ranges.stop[b, i]))) == local
            assert set(range(int(ranges.first[b, i]), int(ranges.sink_stop[b, i]))) == sinks
            assert int(ranges.visible[b, i]) == len(seen)
            assert int(ranges.forced[b, i]) == len(local | sinks)


@settings(max_examples=200)
@given(layouts)
def test_the_forced_blocks_never_exceed_what_the_config_counts(layout: Layout) -> None:
    """An offset inside a key block adds one at most: the width of every mask rests on this."""
    config = StreamConfig(layout.q_block, layout.k_block, 99, sink_blocks=layout.sinks, local_blocks=layout.local)
    most = config.forced_blocks + (layout.past % layout.k_block != 0)
    assert int(ranges_of(layout).forced.max()) <= most


def test_a_batch_row_of_padding_alone_sees_nothing() -> None:
    layout = Layout(8, 0, 0, 4, 4, None, 1, 0, [(8, 0), (0, 0)])
    assert ranges_of(layout).visible.tolist() == [[0, 0], [1, 2]]


def test_the_count_over_rows_and_keys_can_tell_a_wrong_range() -> None:
    plain = Layout(8, 0, 0, 4, 4, None, 1, 0, [(0, 0)])
    assert seen_blocks(plain, 0, 1) == {0, 1}
    assert seen_blocks(replace(plain, window=1), 0, 1) == {1}
    assert seen_blocks(replace(plain, padding=[(4, 0)]), 0, 1) == {1}

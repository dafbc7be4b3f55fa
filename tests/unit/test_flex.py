"""To and from flex_attention's BlockMask, by what flex_attention itself then computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import BlockMask, StreamConfig, from_flex, select_blocks, to_flex

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@st.composite
def random_masks(draw: st.DrawFn) -> BlockMask:
    """Any blocks, selected at random over ragged lengths, offsets and windows."""
    q_len, past = draw(st.integers(1, 40)), draw(st.integers(0, 20))
    heads, batch = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    config = StreamConfig(
        q_block=draw(st.sampled_from([4, 8, 16])),
        k_block=draw(st.sampled_from([4, 8, 16])),
        k=draw(st.integers(6, 9)),
        selector="random",
        seed=draw(st.integers(0, 99)),
    )
    rule = ScoreRule(1.0, past, draw(st.none() | st.integers(1, 30)))
    q, k = torch.zeros(batch, heads, q_len, 4), torch.zeros(batch, heads, past + q_len, 4)
    return select_blocks(q, k, config, rule)


@settings(max_examples=60)
@given(random_masks(), st.booleans())
def test_there_and_back(mask: BlockMask, pad: bool) -> None:
    assert from_flex(to_flex(mask, pad=pad), offset=mask.offset, window=mask.window).equal(mask)


def kept_by(flex, q_len: int, kv_len: int) -> Tensor:
    """What a flex mask keeps token by token: its listed blocks, of partial ones what `mask_mod` allows."""
    batch, heads = flex.kv_num_blocks.shape[:2]
    q_block, k_block = flex.BLOCK_SIZE
    listed = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, flex.kv_num_blocks.shape)).tolist():
        for block in flex.kv_indices[b, h, i, : flex.kv_num_blocks[b, h, i]].tolist():
            listed[b, h, i * q_block : (i + 1) * q_block, block * k_block : (block + 1) * k_block] = True
    return listed & create_mask(flex.mask_mod, batch, heads, q_len, kv_len, device="cpu")


@settings(max_examples=60)
@given(random_masks())
def test_flex_keeps_the_same_tokens(mask: BlockMask) -> None:
    assert torch.equal(kept_by(to_flex(mask), mask.q_len, mask.kv_len), mask.to_dense())


@settings(max_examples=20)
@given(random_masks(), st.integers(0, 9))
def test_flex_attention_over_it_is_attention_over_the_dense_mask(mask: BlockMask, seed: int) -> None:
    """Eager flex_attention evaluates `mask_mod` alone, so listed blocks are put into it here."""
    dense = mask.to_dense()
    flex = to_flex(mask)

    def listed_and_visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        block = torch.arange(flex.kv_indices.shape[-1])
        table = flex.kv_indices[b, h, i // mask.q_block]
        listed = (table == j // mask.k_block) & (block < flex.kv_num_blocks[b, h, i // mask.q_block])
        return listed.any() & flex.mask_mod(b, h, i, j)

    random = torch.Generator().manual_seed(seed)
    batch, heads, q_len, kv_len = mask.shape
    q = torch.randn(batch, heads, q_len, 16, generator=random)
    k, v = torch.randn(2, batch, heads, kv_len, 16, generator=random).unbind(0)
    block_mask = create_block_mask(
        listed_and_visible, batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=(mask.q_block, mask.k_block)
    )
    out = flex_attention(q, k, v, block_mask=block_mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, dense).nan_to_num(0.0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_partial_and_full_blocks_of_flex_are_both_taken_over() -> None:
    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx

    flex = create_block_mask(causal, 1, 2, 100, 100, device="cpu", BLOCK_SIZE=(16, 16))
    assert flex.full_kv_num_blocks is not None
    assert int(flex.full_kv_num_blocks.sum()) > 0
    dense = torch.ones(1, 2, 100, 100, dtype=torch.bool).tril()
    assert from_flex(flex).equal(BlockMask.from_dense(dense, 16, 16))


def test_a_flex_mask_that_looks_ahead_is_refused() -> None:
    def everything(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= 0

    flex = create_block_mask(everything, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=(16, 16))
    with pytest.raises(ValueError, match=r"query block 0 .* keeps key block"):
        from_flex(flex)


def test_the_unpadded_table_stays_as_small_as_the_mask() -> None:
    mask = BlockMask(torch.zeros(1, 1, 64, 1, dtype=torch.int32), 4, 4, 256, 256)
    assert to_flex(mask, pad=False).kv_indices.shape[-1] == 1
    assert to_flex(mask).kv_indices.shape[-1] == 64

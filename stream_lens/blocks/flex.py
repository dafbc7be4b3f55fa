"""BlockMask to and from `torch.nn.attention.flex_attention.BlockMask`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from stream_lens.blocks.block_mask import BlockMask, ascending, trimmed


def to_flex(mask: BlockMask, *, pad: bool = True) -> FlexBlockMask:
    """The same blocks for flex_attention, with a `mask_mod` for causality (at the mask's offset) and window.

    Args:
        mask: to convert.
        pad: pad the index table to all key blocks, q_blocks × k_blocks integers for each head: flex_attention takes the
            table's width for the number of key blocks, in its backward pass and on the CPU. False keeps O(T · k), for
            the forward pass on a GPU; it needs a torch whose `from_kv_blocks` knows `compute_q_blocks`.
    """
    indices = mask.indices.clamp(min=0)
    if pad:
        indices = torch.nn.functional.pad(indices, (0, max(0, mask.k_blocks - mask.k)))
    offset, window = mask.offset, mask.window

    def causal(batch, head, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        visible = kv_idx <= q_idx + offset
        return visible if window is None else visible & (kv_idx > q_idx + offset - window)

    narrow: dict[str, Any] = {} if pad else {"compute_q_blocks": False}
    return FlexBlockMask.from_kv_blocks(
        mask.kept.sum(-1, dtype=torch.int32),
        indices,
        BLOCK_SIZE=(mask.q_block, mask.k_block),
        mask_mod=causal,
        seq_lengths=(mask.q_len, mask.kv_len),
        **narrow,
    )


def from_flex(flex: FlexBlockMask, *, offset: int = 0, window: int | None = None) -> BlockMask:
    """The blocks of a flex_attention mask, partial and full ones alike.

    What its `mask_mod` hides inside a block is not carried over, except causality at `offset` and `window`.

    Raises:
        ValueError: it keeps a block that lies wholly after its queries, as a mask that is not causal does.
    """

    def used(count: torch.Tensor | None, table: torch.Tensor | None) -> list[torch.Tensor]:
        if count is None or table is None:
            return []
        slot = torch.arange(table.shape[-1], device=table.device)
        return [torch.where(slot < count[..., None], table, -1)]

    tables = used(flex.kv_num_blocks, flex.kv_indices) + used(flex.full_kv_num_blocks, flex.full_kv_indices)
    q_len, kv_len = flex.seq_lengths
    q_block, k_block = flex.BLOCK_SIZE
    indices = trimmed(ascending(torch.cat(tables, -1)))[:, :, : -(-q_len // q_block)]
    return BlockMask(indices.contiguous(), q_block, k_block, q_len, kv_len, offset, window).check()

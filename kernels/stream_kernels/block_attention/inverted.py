"""The kept blocks seen from the keys: which slots keep each key block, cut into pieces of work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_ENTRIES = 256  # slots one program walks; a sink block is kept by every query block, so its list is cut


@dataclass(frozen=True)
class Inverted:
    """``entries``: flat positions in ``indices`` sorted by the key block they keep, ties in their order there.

    Item ``i`` is ``entries[item_first[i] : item_last[i]]``, all keeping the key block
    ``item_block[i] = (batch * kv_heads + kv_head) * k_blocks + block``. Every key block has an item, if an empty
    one. ``item_part[i]`` is -1 where the item is the block's only one, else its row among the partial sums;
    ``cut_blocks`` have ``cut_into`` partial sums each, in order.
    """

    entries: Int[Tensor, "entries"]
    item_block: Int[Tensor, "items"]
    item_first: Int[Tensor, "items"]
    item_last: Int[Tensor, "items"]
    item_part: Int[Tensor, "items"]
    cut_blocks: Int[Tensor, "cut"]
    cut_into: Int[Tensor, "cut"]
    parts: int

    def add_up(
        self, parts: Float[Tensor, "parts k_block d_head"], whole: Float[Tensor, "blocks k_block d_head"]
    ) -> None:
        """Writes the sums of the blocks that were cut into `whole`, always adding in the same order."""
        if self.parts:
            sums = torch.segment_reduce(parts, "sum", lengths=self.cut_into, axis=0)
            whole.index_copy_(0, self.cut_blocks, sums.to(whole.dtype))


def invert(indices: Int[Tensor, "batch head q_blocks k"], *, kv_heads: int, k_blocks: int) -> Inverted:
    """O(kept blocks) memory, one sort; waits once for the device, to learn how many pieces there are."""
    batch, heads = indices.shape[:2]
    blocks = batch * kv_heads * k_blocks
    device = indices.device
    owner = torch.arange(batch * kv_heads, device=device).view(batch, kv_heads, 1, 1, 1) * k_blocks
    by_key_head = indices.unflatten(1, (kv_heads, heads // kv_heads))
    kept = torch.where(by_key_head >= 0, by_key_head + owner, blocks).flatten()
    kept, entries = torch.sort(kept, stable=True)
    starts = torch.searchsorted(kept, torch.arange(blocks + 1, device=device))

    pieces = ((starts.diff() + MOST_ENTRIES - 1) // MOST_ENTRIES).clamp(min=1)
    ends = pieces.cumsum(0)
    is_cut = pieces > 1
    parts, items = torch.stack([torch.where(is_cut, pieces, 0).sum(), ends[-1]]).tolist()
    item_block = torch.repeat_interleave(pieces, output_size=items)
    piece = torch.arange(items, device=device) - (ends - pieces)[item_block]
    item_first = starts[item_block] + piece * MOST_ENTRIES
    item_is_part = is_cut[item_block]
    position = torch.int32 if entries.numel() < 2**31 else torch.int64
    return Inverted(
        entries=entries.to(position),
        item_block=item_block.to(torch.int32),
        item_first=item_first.to(position),
        item_last=torch.minimum(item_first + MOST_ENTRIES, starts[item_block + 1]).to(position),
        item_part=torch.where(item_is_part, item_is_part.cumsum(0) - 1, -1).to(torch.int32),
        cut_blocks=is_cut.nonzero().flatten(),
        cut_into=pieces[is_cut],
        parts=parts,
    )

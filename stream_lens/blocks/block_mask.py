"""BlockMask: which key blocks each query block attends to. Data only; O(T · k) memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Int
from torch import Tensor

_NONE = torch.iinfo(torch.int32).max  # sorts empty slots behind every block


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The kept key blocks of every query block.

    Attributes:
        indices: int32 [batch, head, q_blocks, k], ascending along k; empty slots are -1 and stand last.
        q_block, k_block: queries per query block, keys per key block.
        q_len, kv_len: tokens on each side; the last blocks may be ragged.
        offset: absolute position of the first query (`kv_len - q_len` when decoding with a KV cache).
        window: the layer's sliding window in keys, None for none. Causality and the window hold within blocks too.

    The constructor checks shapes only: values come from code that keeps to the format above. `check` reads them all,
    for tables from elsewhere.

    Raises:
        ValueError: the shape or dtype of `indices`, or a size, does not fit.
    """

    indices: Int[Tensor, "batch head q_blocks k"]
    q_block: int
    k_block: int
    q_len: int
    kv_len: int
    offset: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        if self.indices.ndim != 4 or self.indices.dtype != torch.int32:
            raise ValueError(
                f"indices must be int32 of shape [batch, head, q_blocks, k]; got {self.indices.dtype} of shape "
                f"{tuple(self.indices.shape)}."
            )
        for name, least in (("q_block", 1), ("k_block", 1), ("q_len", 0), ("kv_len", 0), ("offset", 0), ("window", 1)):
            size = getattr(self, name)
            if size is not None and size < least:
                raise ValueError(f"{name}={size} is not allowed: give at least {least}.")
        if self.offset + self.q_len > self.kv_len:
            raise ValueError(
                f"{self.q_len} queries from position {self.offset} end after the {self.kv_len} keys: a causal mask "
                "needs kv_len >= offset + q_len."
            )
        if self.indices.shape[2] != self.q_blocks:
            raise ValueError(
                f"{self.q_len} queries in blocks of {self.q_block} make {self.q_blocks} query blocks; "
                f"indices has {self.indices.shape[2]}."
            )

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.q_block)

    @property
    def k_blocks(self) -> int:
        return -(-self.kv_len // self.k_block)

    @property
    def k(self) -> int:
        """Slots per query block: the most key blocks that any of them keeps."""
        return self.indices.shape[3]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the dense pattern it stands for: [batch, head, query, key]."""
        return (self.indices.shape[0], self.indices.shape[1], self.q_len, self.kv_len)

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes

    @property
    def kept(self) -> Bool[Tensor, "batch head q_blocks k"]:
        """True in the slots that hold a block."""
        return self.indices >= 0

    def __repr__(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return (
            f"BlockMask({list(self.shape)}, q_block={self.q_block}, k_block={self.k_block}, k={self.k}, "
            f"{self.sparsity('causal'):.1%} of the causal half pruned{window})"
        )

    def sparsity(self, of: str = "causal") -> float:
        """Share of blocks not kept, averaged over batch and heads.

        Args:
            of: "causal": of the blocks that causality lets some row of the query block see. "full": of all
                q_blocks × k_blocks, the paper's T². "visible": of those that causality and the window allow; equals
                "causal" in a layer without a window.
        """
        row_first = self.offset + torch.arange(self.q_blocks) * self.q_block
        row_last = (row_first + self.q_block - 1).clamp(max=self.offset + self.q_len - 1)
        causal = (row_last // self.k_block + 1).clamp(max=self.k_blocks)
        first = torch.zeros_like(row_first)
        if self.window is not None:
            first = (row_first - self.window + 1).clamp(min=0) // self.k_block
        totals = {
            "causal": int(causal.sum()),
            "full": self.q_blocks * self.k_blocks,
            "visible": int((causal - first).sum()),
        }
        if of not in totals:
            raise ValueError(f"of={of!r} is not known: choose one of {', '.join(totals)}.")
        blocks = totals[of] * self.indices.shape[0] * self.indices.shape[1]
        return 1 - int(self.kept.sum()) / blocks if blocks else 0.0

    def check(self) -> BlockMask:
        """This mask, once every index is known to be one that its query block can see; reads them all.

        Raises:
            ValueError: a row is not ascending, names a block twice or one out of range, or has an empty slot before
                another.
        """
        indices = self.indices
        last_row = torch.arange(1, self.q_blocks + 1, device=indices.device) * self.q_block - 1
        stop = (self.offset + last_row.clamp(max=self.q_len - 1)) // self.k_block + 1
        outside = (indices < -1) | (indices >= stop[:, None])
        if outside.any():
            b, h, i, n = outside.nonzero()[0].tolist()
            raise ValueError(
                f"query block {i} (batch {b}, head {h}) keeps key block {int(indices[b, h, i, n])}: blocks 0 to "
                f"{int(stop[i]) - 1} begin before its last row; use -1 for an empty slot."
            )
        ordered = torch.where(indices < 0, _NONE, indices)
        unordered = (ordered[..., 1:] <= ordered[..., :-1]) & (indices[..., 1:] >= 0)
        if unordered.any():
            b, h, i, _ = unordered.nonzero()[0].tolist()
            raise ValueError(
                f"query block {i} (batch {b}, head {h}) keeps {indices[b, h, i].tolist()}: give each block once, in "
                "ascending order, with empty slots (-1) last."
            )
        return self

    def to(self, device: torch.device | str) -> BlockMask:
        return replace(self, indices=self.indices.to(device))

    def select(
        self, batch: slice = slice(None), heads: slice | list[int] | Tensor = slice(None), q_blocks: slice = slice(None)
    ) -> BlockMask:
        """The mask of some batch rows, heads and (contiguous) query blocks, which keep their absolute positions."""
        start, stop, step = q_blocks.indices(self.q_blocks)
        if step != 1:
            raise ValueError(f"query blocks can be cut out with step 1 only; got step {step}.")
        stop = max(start, stop)
        return replace(
            self,
            indices=self.indices[batch][:, heads, start:stop],
            q_len=min(stop * self.q_block, self.q_len) - min(start * self.q_block, self.q_len),
            offset=self.offset + start * self.q_block,
        )

    def to_dense(
        self, rows: slice = slice(None), heads: slice | list[int] = slice(None)
    ) -> Bool[Tensor, "batch heads rows key"]:
        """Bool per token: True where the block is kept, the key is not after the query and the window reaches it.

        Memory is rows × kv_len for each head asked for: ask for few of them when the text is long.
        """
        row = torch.arange(self.q_len, device=self.indices.device)[rows]
        slots = self.indices[:, heads][:, :, row // self.q_block].long()
        kept = torch.zeros(*slots.shape[:3], self.k_blocks + 1, dtype=torch.bool, device=row.device)
        kept.scatter_(-1, torch.where(slots < 0, self.k_blocks, slots), True)
        dense = repeat(kept[..., :-1], "b h r n -> b h r (n j)", j=self.k_block)[..., : self.kv_len]
        return dense & visible_keys(self.offset + row, self.kv_len, self.window)

    def contains(self, blocks: Int[Tensor, "batch head q_blocks n"]) -> Bool[Tensor, "batch head q_blocks n"]:
        """Whether each block (−1 never) is kept by its query block."""
        if self.k == 0:
            return torch.zeros_like(blocks, dtype=torch.bool)
        ours = torch.where(self.indices < 0, _NONE, self.indices)
        place = torch.searchsorted(ours, blocks.to(torch.int32).contiguous()).clamp(max=self.k - 1)
        return (ours.gather(-1, place) == blocks) & (blocks >= 0)

    def where(self, keep: Bool[Tensor, "batch head q_blocks k"]) -> BlockMask:
        """The blocks of this mask whose slot is True in `keep`."""
        return replace(self, indices=ascending(torch.where(keep, self.indices, -1)))

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, lambda a, b: a.where(b.contains(a.indices)).indices)

    def __sub__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, lambda a, b: a.where(~b.contains(a.indices)).indices)

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, lambda a, b: ascending(torch.cat([a.indices, (b - a).indices], -1)))

    def __xor__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, lambda a, b: ascending(torch.cat([(a - b).indices, (b - a).indices], -1)))

    def equal(self, other: BlockMask) -> bool:
        """Whether both keep the same blocks over the same geometry."""
        return self._geometry() == other._geometry() and not bool((self ^ other).kept.any())

    def _geometry(self) -> tuple[object, ...]:
        return (*self.shape, self.q_block, self.k_block, self.offset, self.window)

    def _combined(self, other: BlockMask, combine: Callable[[BlockMask, BlockMask], Tensor]) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if self._geometry() != other._geometry():
            raise ValueError(
                f"two masks combine only over the same tokens and blocks; got {self!r} at offset {self.offset} and "
                f"{other!r} at offset {other.offset}."
            )
        return replace(self, indices=trimmed(combine(self, other)))

    @staticmethod
    def from_dense(
        dense: Bool[Tensor, "batch head query key"],
        q_block: int,
        k_block: int,
        offset: int = 0,
        window: int | None = None,
    ) -> BlockMask:
        """The smallest block mask that covers every True of a dense one (a block is kept if any of its tokens is).

        Raises:
            ValueError: the dense mask allows a key that causality or the window hides, which no BlockMask can.
        """
        if dense.ndim != 4 or dense.dtype != torch.bool:
            raise ValueError(
                f"a dense mask is bool [batch, head, query, key]; got {dense.dtype} of shape {tuple(dense.shape)}."
            )
        q_len, kv_len = dense.shape[-2:]
        if (dense & ~visible_keys(torch.arange(q_len, device=dense.device) + offset, kv_len, window)).any():
            raise ValueError(
                f"the dense mask allows keys that a row at offset {offset} with window {window} cannot see: clear them "
                "first, for instance with `torch.tril`."
            )
        padded = torch.nn.functional.pad(dense, (0, -kv_len % k_block, 0, -q_len % q_block))
        blocks = rearrange(padded, "b h (i r) (n j) -> b h i n r j", r=q_block, j=k_block).any(-1).any(-1)
        index = torch.arange(blocks.shape[-1], dtype=torch.int32, device=dense.device)
        indices = trimmed(ascending(torch.where(blocks, index, -1)))
        return BlockMask(indices, q_block, k_block, q_len, kv_len, offset, window)


def visible_keys(position: Int[Tensor, "rows"], kv_len: int, window: int | None) -> Bool[Tensor, "rows key"]:
    """Which keys rows at these absolute positions may see by causality and the window."""
    key = torch.arange(kv_len, device=position.device)
    visible = key <= position[:, None]
    return visible if window is None else visible & (key > position[:, None] - window)


def ascending(indices: Int[Tensor, "*rows k"]) -> Int[Tensor, "*rows k"]:
    """Sorted along the last axis, empty slots (-1) last."""
    ordered = torch.where(indices < 0, _NONE, indices).sort(-1).values
    return torch.where(ordered == _NONE, -1, ordered).to(torch.int32)


def trimmed(indices: Int[Tensor, "*rows k"]) -> Int[Tensor, "*rows k"]:
    """Without the trailing slots that no row uses; at least one slot stays."""
    used = int((indices >= 0).sum(-1).max()) if indices.numel() else 0
    return indices[..., : max(used, 1)].contiguous()

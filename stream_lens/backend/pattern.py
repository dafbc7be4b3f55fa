"""SparsePattern: what `hook_pattern` yields while a model is streamed.

It stands in TransformerLens' forward where the [batch, head, query, key] attention pattern does and has its shape, but
stores block indices, a gate and block masses: O(T · k), never T × T. Two kinds of edit, named apart since dense
TransformerLens code has both:

- *drop* / *keep* blocks: before the softmax, the rest renormalises (attention knock-out).
- *scale*, or ``pattern[:, head] = 0``: after the softmax, nothing renormalises (what zeroing a dense pattern does).

As in torch, ``pattern[:, 3]`` is a view, whose edits reach the pattern, and ``pattern[:, [3]]`` a copy. Unlike in torch
`detach` gives a copy; while the layer runs, an edit of it raises, since the model would not see it.

Patching one run's pattern into another, ``corrupted[:, head] = clean[:, head]``, moves the clean run's probabilities:
they are computed from the clean queries and keys, which a pattern holds unless it was cached with `keep_scores=False`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stream_lens.backend.lazy_tensor import DenseNeededError
from stream_lens.backend.pattern_data import (
    PatternData,
    block_mass,
    cached_copy,
    gate_of,
    masked,
    probabilities,
    row_slice,
    sliced,
)
from stream_lens.backend.pattern_index import PatternIndex, PatternIndexError, parse_index
from stream_lens.blocks import BlockMask


class SparsePattern(torch.Tensor):
    """A block-sparse attention pattern in the place of a dense one. See the module's text for what edits mean."""

    own_data_: PatternData
    view_of_: tuple[SparsePattern, PatternIndex] | None
    """The pattern that this is a view of, and where in it."""
    seen_: PatternData | None
    """That pattern's data when this view's was cut from it."""
    copy_of_: weakref.ref[SparsePattern] | None
    """The running layer's pattern that this is a detached copy of; it is gone once the layer has run."""
    ones_given_: list[Tensor]
    """Gates of ones handed out, which must come back as ones."""

    @staticmethod
    def __new__(cls, data: PatternData, view_of: tuple[SparsePattern, PatternIndex] | None = None) -> SparsePattern:
        shape = tuple(data.mask.shape[axis] for axis in data.present)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=data.dtype, device=data.mask.indices.device)
        made.own_data_, made.view_of_, made.seen_ = data, view_of, None if view_of is None else view_of[0].data_
        made.copy_of_, made.ones_given_ = None, []
        return made

    def __init__(self, data: PatternData, view_of: tuple[SparsePattern, PatternIndex] | None = None) -> None:
        super().__init__()

    @property
    def data_(self) -> PatternData:
        """All that it is; of a view, cut again when the pattern it is a view of has changed."""
        if self.view_of_ is not None:
            whole, where = self.view_of_
            if whole.data_ is not self.seen_:
                self.seen_ = whole.data_
                self.own_data_ = replace(row_slice(self.seen_, where), present=self.own_data_.present)
        return self.own_data_

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsePattern:
        return SparsePattern(self.data_)  # edits make new data, so that copies may share it

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return SparsePattern, (cached_copy(self.data_, keep_scores=True),)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from stream_lens.backend.pattern_functions import pattern_function

        return pattern_function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DenseNeededError(
            f"{func} needs the dense T × T pattern: use pattern.to_dense(rows=slice(…), heads=[…]) first."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        data = self.data_
        edited = ", edited" if data.edited else ""
        return (
            f"SparsePattern({list(self.shape)}, q_block={data.mask.q_block}, k_block={data.mask.k_block}, "
            f"k={data.mask.k}, {data.mask.sparsity('causal'):.1%} of the causal half pruned{edited})"
        )

    # Reading

    @property
    def mask(self) -> BlockMask:
        """The kept blocks: [batch, head, q_blocks, k] indices, also when axes were taken away by integer indices."""
        return self.data_.mask

    @property
    def gate(self) -> Float[Tensor, "batch head q_blocks k"]:
        """Factor on each kept block's probabilities after the softmax; 1 where nothing was edited.

        To change it use `scale` or `with_gate`.
        """
        if self.data_.gate is not None:
            return self.data_.gate
        ones, whole = gate_of(self.data_), self
        while whole.view_of_ is not None:
            whole = whole.view_of_[0]
        whole.ones_given_.append(ones)
        return ones

    @property
    def block_mass(self) -> Float[Tensor, "*batch_head q_blocks k"]:
        """Probability that each kept block holds, summed over its rows and keys, before the gate; 0 in empty slots.

        Axes that integer indices took away are gone here too. Divide by `mask.q_block` for the mean share of a row.

        Raises:
            NoScoresError: the layer did not run to its end, or blocks were edited, and the scores were not kept.
        """
        mass = block_mass(self.data_)
        taken = tuple(axis for axis in (0, 1) if axis not in self.data_.present)
        return mass[tuple(0 if axis in taken else slice(None) for axis in range(2))]

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of indices, gate and masses; `scores_nbytes` has those of the queries and keys."""
        data = self.data_
        mass = 0 if data.cell.value is None else data.mask.indices.numel() * data.cell.value.element_size()
        return data.mask.nbytes + (0 if data.gate is None else data.gate.nbytes) + mass

    @property
    def scores_nbytes(self) -> int:
        """Bytes of the queries and keys it refers to, shared with the cache's own q and k where it has them."""
        return sum(scores.nbytes for scores in self.data_.sources if scores is not None)

    def to_dense(
        self, rows: slice = slice(None), heads: slice | Sequence[int] | int = slice(None)
    ) -> Float[Tensor, "*batch_head rows key"]:
        """Probabilities of some rows and heads, the gate applied: 0 where a block is dropped.

        Args:
            rows: query tokens, as a slice; memory is rows × kv_len for each head.
            heads: heads to give, as a slice, a list or one integer (which takes the axis away).

        Raises:
            NoScoresError: the pattern was cached with keep_scores=False; `pattern.mask.to_dense()` and
                `pattern.block_mass` still work.
            PatternIndexError: `rows` or `heads` is no such thing, or out of range.
        """
        if not isinstance(rows, slice):
            raise PatternIndexError(
                f"rows={rows!r} is not allowed: give a slice of query tokens, as in slice(-32, None)."
            )
        data = self.data_
        where = parse_index((slice(None), heads), data.mask.shape, (0, 1, 2, 3))
        present = [axis for axis in data.present if axis not in where.dropped]
        part = sliced(data, where.batch, where.heads, slice(0, data.mask.q_blocks))
        dense = probabilities(part, rows)
        taken = tuple(0 if axis not in present else slice(None) for axis in (0, 1))
        dense = dense[taken].to(self.dtype)
        return dense if 2 in present else dense[..., 0, :]

    def __getitem__(self, index: Any) -> SparsePattern:
        data = self.data_
        where = parse_index(index, data.mask.shape, data.present)
        if where.keys != (0, data.mask.kv_len):
            raise PatternIndexError(
                "a SparsePattern cannot be cut along keys: use pattern.to_dense(rows=slice(…), heads=[…])[..., keys], "
                "or pattern.mask for the kept blocks."
            )
        part = replace(
            row_slice(data, where), present=tuple(axis for axis in data.present if axis not in where.dropped)
        )
        return SparsePattern(part, None if where.copies else (self, where))

    # Editing; the names that end in _ change this pattern, the others return a new one

    def __setitem__(self, index: Any, value: Any) -> None:
        from stream_lens.backend.pattern_edit import assigned

        self.become_(assigned(self.data_, index, value))

    def become_(self, data: PatternData) -> SparsePattern:
        """This pattern with other data, which the pattern that it is a view of gets too."""
        from stream_lens.backend.pattern_edit import put_back

        if self.copy_of_ is not None and self.copy_of_() is not None:
            raise RuntimeError(
                "this is a detached copy of a pattern whose layer is running, which would not see the edit: edit the "
                "pattern that the hook was given."
            )
        if self.view_of_ is None:
            self.own_data_ = data
        else:
            whole, where = self.view_of_
            whole.become_(put_back(whole.data_, where, data))
        return self

    def drop(
        self, blocks: BlockMask | Bool[Tensor, "batch head q_blocks k"] | None = None, **where: Any
    ) -> SparsePattern:
        """Without some blocks, the rest of each row renormalised: attention knock-out.

        Args:
            blocks: a BlockMask of the same geometry, or True per slot of `mask.indices`; None for all blocks.
            **where: restrict to `batch`, `heads` (integer, slice, list), `rows`, `keys` (slices of tokens on block
                edges).
        """
        from stream_lens.backend.pattern_edit import slots

        return self._with_kept(~slots(self.data_, blocks, where))

    def keep(
        self, blocks: BlockMask | Bool[Tensor, "batch head q_blocks k"] | None = None, **where: Any
    ) -> SparsePattern:
        """Only some blocks, renormalised over them. `where` names what to keep, as in `drop`."""
        from stream_lens.backend.pattern_edit import slots

        return self._with_kept(slots(self.data_, blocks, where))

    def scale(
        self, factor: float, blocks: BlockMask | Bool[Tensor, "batch head q_blocks k"] | None = None, **where: Any
    ) -> SparsePattern:
        """Some blocks' probabilities times `factor` after the softmax; nothing renormalises. `where` as in `drop`."""
        from stream_lens.backend.pattern_edit import slots

        chosen = slots(self.data_, blocks, where)
        gate = gate_of(self.data_)
        return self.with_gate(torch.where(chosen, gate * factor, gate))

    def drop_(self, blocks: Any = None, **where: Any) -> SparsePattern:
        """`drop`, in place."""
        return self.become_(self.drop(blocks, **where).data_)

    def keep_(self, blocks: Any = None, **where: Any) -> SparsePattern:
        """`keep`, in place."""
        return self.become_(self.keep(blocks, **where).data_)

    def scale_(self, factor: float, blocks: Any = None, **where: Any) -> SparsePattern:
        """`scale`, in place."""
        return self.become_(self.scale(factor, blocks, **where).data_)

    def with_gate(self, gate: Float[Tensor, "batch head q_blocks k"]) -> SparsePattern:
        """With a gate of your own, such as one that requires grad (`stream_lens.circuits.attribution`)."""
        if gate.shape != self.mask.indices.shape:
            raise ValueError(f"gate must have shape {list(self.mask.indices.shape)}; got {list(gate.shape)}.")
        return SparsePattern(replace(self.data_, gate=gate, edited=True))

    def with_mask(self, mask: BlockMask) -> SparsePattern:
        """With other blocks, from this run's own queries and keys; the gate is reset to 1."""
        if (mask.shape, mask.q_block, mask.k_block) != (self.mask.shape, self.mask.q_block, self.mask.k_block):
            raise ValueError(f"the mask must cover the same tokens and blocks as {self.mask!r}; got {mask!r}.")
        return SparsePattern(masked(self.data_, mask, gate=None))

    def _with_kept(self, kept: Bool[Tensor, "batch head q_blocks k"]) -> SparsePattern:
        data = self.data_
        kept = kept & data.mask.kept
        order = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices
        indices = torch.where(kept, data.mask.indices, -1).gather(-1, order).contiguous()
        gate = None if data.gate is None else data.gate.gather(-1, order)
        return SparsePattern(masked(data, replace(data.mask, indices=indices), gate=gate))

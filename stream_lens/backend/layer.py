"""StreamedLayer: one layer's part in a streamed run, from scores to pattern to attention output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.pattern_data import MassCell, PatternData, for_each_source, is_whole, whole_rows
from stream_lens.backend.scores import Scores
from stream_lens.blocks import BlockMask, StreamConfig, block_sparse_attention, select_blocks
from stream_lens.blocks.dense import dense_attention
from stream_lens.blocks.kernel_choice import Kernel


@dataclass(eq=False)
class StreamedLayer:
    """State of one layer while a model is streamed.

    Attributes:
        number: which layer.
        name: its place in the model, for messages.
        config, kernel, observe, keep_scores: as given to `stream`.
        pattern: made by the softmax of the running forward, until values are multiplied.
        runs: attention outputs made since the counter was last set.
    """

    number: int
    name: str
    config: StreamConfig
    kernel: Kernel = "auto"
    observe: bool = False
    keep_scores: bool = True
    pattern: SparsePattern | None = field(default=None, repr=False)
    runs: int = 0

    def make_pattern(self, scores: Scores, dtype: torch.dtype) -> SparsePattern:
        """Choose blocks and hand out the pattern that `hook_pattern` will see."""
        if self.pattern is not None:
            raise RuntimeError(f"{self.name}: a second softmax came before the first pattern met its values.")
        mask = select_blocks(scores.q, scores.k, self.config, scores.rule, layer=self.number)
        key_mask = scores.rule.key_mask
        data = PatternData(
            mask,
            None,
            MassCell(mask),
            whole_rows(mask),
            (scores,),
            dtype=dtype,
            first_keys=None if key_mask is None else tuple(key_mask.to(torch.uint8).argmax(-1).tolist()),
            layer=self.number,
            run=self,
        )
        self.pattern = SparsePattern(data)
        return SparsePattern(data)

    def score_edit_error(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name}: hook_attn_scores gave something else than it was handed. A streamed layer never computes "
            "its T × T scores, so such an edit cannot take effect: edit hook_pattern instead (pattern.drop "
            "renormalises, as masking a score does)."
        )


def attend_pattern(pattern: SparsePattern, values: Any) -> Tensor:
    """``pattern @ v``: inside a streamed forward the layer's kernel; outside it the torch path on the kept scores."""
    from stream_lens.backend.lazy_scores import LazyHeads

    if isinstance(values, LazyHeads):
        return attend(values.layer, pattern, values.heads)
    return _sparse(pattern.data_, values, "auto")[0]


def attend(layer: StreamedLayer, pattern: Tensor, values: Float[Tensor, "batch kv_head key d_head"]) -> Tensor:
    """Attention output [batch, head, query, d_head] of what `hook_pattern` gave back."""
    made, layer.pattern = layer.pattern, None
    if made is None:
        raise layer.score_edit_error()
    layer.runs += 1
    if not isinstance(pattern, SparsePattern):
        return _dense_edit(layer, made, pattern, values)
    if any(bool((ones != 1).any()) for ones in pattern.ones_given_):
        raise RuntimeError(
            f"{layer.name}: what pattern.gate gave was changed in place, which the pattern does not see: use "
            "pattern.scale_(factor, heads=…), or return pattern.with_gate(gate)."
        )
    data = pattern.data_
    if _place(data) != _place(made.data_) or data.present != (0, 1, 2, 3):
        raise ValueError(
            f"{layer.name}: hook_pattern gave back {pattern!r}; this run needs {list(made.shape)}. Return the whole "
            "pattern, edited."
        )
    if layer.observe:
        return _observed(layer, made.data_, data, values)
    out, mass = _sparse(data, values, layer.kernel)
    if is_whole(data):
        data.cell.fill(mass)
    return out


def _place(data: PatternData) -> tuple[object, ...]:
    mask = data.mask
    return mask.shape, mask.q_block, mask.k_block, mask.offset


def _sparse(data: PatternData, values: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Output and block masses, summed over runs where a pattern was patched together from several."""

    def run(scores: Scores, mask: BlockMask) -> Any:
        # One of them may have a head for each query head where the other has one for each group.
        kv_heads = max(scores.k.shape[1], values.shape[1])
        k, v = (x.repeat_interleave(kv_heads // x.shape[1], 1) for x in (scores.k.to(values.dtype), values))
        return block_sparse_attention(scores.q.to(v.dtype), k, v, mask, scores.rule, data.gate, kernel=kernel)

    results = for_each_source(data, run)
    if len(results) == 1:
        return results[0].out, results[0].block_mass
    return sum(result.out for result in results), sum(result.block_mass for result in results)


def _observed(layer: StreamedLayer, made: PatternData, given: PatternData, values: Tensor) -> Tensor:
    if given.edited or (given.sources, given.cell_rows) != (made.sources, made.cell_rows):
        raise RuntimeError(
            f"{layer.name}: the pattern was edited while streaming with observe=True, where the dense output flows on "
            "and the edit could not take effect. Stream without observe to edit."
        )
    scores = made.sources[0]
    assert scores is not None
    result = dense_attention(scores.q, scores.k, values, scores.rule, made.mask)
    made.cell.fill(result.block_mass)
    return result.out


def _dense_edit(layer: StreamedLayer, made: SparsePattern, pattern: Any, values: Tensor) -> Tensor:
    """A hook gave back a dense [batch, head, query, key] tensor: use it as the dense model would."""
    if layer.observe:
        raise RuntimeError(f"{layer.name}: hook_pattern gave back a tensor while streaming with observe=True.")
    if not isinstance(pattern, Tensor) or pattern.shape != made.shape:
        given = f"shape {list(pattern.shape)}" if isinstance(pattern, Tensor) else type(pattern).__name__
        raise ValueError(
            f"{layer.name}: hook_pattern must give back the SparsePattern it was handed, edited or not, or a dense "
            f"tensor of shape {list(made.shape)}; it gave {given}."
        )
    groups = pattern.shape[1] // values.shape[1]
    return pattern.to(values.dtype) @ values.repeat_interleave(groups, 1)


def refuse_backward_hooks(layer: StreamedLayer, attn: Any) -> None:
    """Raise if a backward hook waits on scores or pattern: neither is a tensor that autograd could visit."""
    for name in ("hook_attn_scores", "hook_pattern"):
        hook = getattr(attn, name, None)
        if hook is not None and (hook.bwd_hooks or hook._backward_hooks or hook._backward_pre_hooks):
            raise RuntimeError(
                f"{layer.name}.{name} has a backward hook, which cannot fire on a streamed layer: no T × T gradient is "
                "ever made. Leave it out with names_filter (for example names_filter=lambda name: not "
                "name.endswith(('hook_pattern', 'hook_attn_scores'))), or put a gate that requires grad on the pattern "
                "(pattern.with_gate) and read the gate's gradient, one number for each kept block."
            )


def without_scores(pattern: SparsePattern) -> SparsePattern:
    """A copy that holds only mask, gate and masses."""
    return SparsePattern(replace(pattern.data_, sources=(None,) * len(pattern.data_.sources), run=None))

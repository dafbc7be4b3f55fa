"""Ablation: a metric without some blocks, heads, spans or distances; what correlational scores must be held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from stream_lens.backend.long_inputs import text_tokens_only, tokens_within_context
from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import BlockMask, StreamConfig
from stream_lens.circuits.edited_runs import (
    Edit,
    masks_of_run,
    run_edited,
    streamed_for_now,
    streamed_layers,
)
from stream_lens.circuits.metrics import MetricFunction, positions_read, scalar
from stream_lens.circuits.results import json_of
from stream_lens.circuits.runs import about_masks
from stream_lens.circuits.text_tokens import Span

Head = tuple[int, int]
How = Literal["drop", "zero"]


@dataclass(frozen=True, eq=False)
class Ablation:
    """What to take out: the kept blocks that every field given here names. No field at all is every block.

    Attributes:
        name: for tables and figures.
        keys: spans of tokens [start, stop): key blocks with any token in one of them.
        rows: spans of tokens: query blocks with any token in one of them. None with `keys` means the query blocks
            that begin after the last key block named for them, so that a row keeps its own block.
        heads: (layer, head) pairs; None for all heads.
        beyond: key blocks that end more than this many tokens before their query block begins.
        spare_sinks: with `beyond`, this many first key blocks stay.
        blocks: given blocks by layer, such as one side of a mask difference; layers not named keep all.
    """

    name: str
    keys: tuple[Span, ...] | None = None
    rows: tuple[Span, ...] | None = None
    heads: frozenset[Head] | None = None
    beyond: int | None = None
    spare_sinks: int = 1
    blocks: Mapping[int, BlockMask] | None = None

    def chosen(self, mask: BlockMask, layer: int) -> Bool[Tensor, "batch head q_blocks k"]:
        """The kept slots of one layer that this names."""
        device = mask.indices.device
        chosen = mask.kept.clone()
        if self.heads is not None:
            own = torch.zeros(mask.shape[1], dtype=torch.bool, device=device)
            own[[head for number, head in self.heads if number == layer]] = True
            chosen &= own[:, None, None]
        q_block = torch.arange(mask.q_blocks, device=device)
        if self.rows is not None:
            chosen &= _in_spans(q_block, self.rows, mask.q_block, mask.offset)[:, None]
        if self.keys is not None:
            chosen &= self._at_keys(mask, mask.offset + q_block * mask.q_block)
        if self.beyond is not None:
            first_row = (mask.offset + q_block * mask.q_block)[:, None]
            far = (mask.indices + 1) * mask.k_block <= first_row - self.beyond
            chosen &= far & (mask.indices >= self.spare_sinks)
        if self.blocks is not None:
            named = self.blocks.get(layer)
            chosen &= torch.zeros_like(chosen) if named is None else named.contains(mask.indices)
        return chosen

    def _at_keys(self, mask: BlockMask, first_row: Tensor) -> Bool[Tensor, "batch head q_blocks k"]:
        assert self.keys is not None
        if self.rows is not None:
            return _in_spans(mask.indices, self.keys, mask.k_block, 0)
        later = torch.zeros_like(mask.kept)
        for span in self.keys:
            end = -(-span[1] // mask.k_block) * mask.k_block
            later |= _in_spans(mask.indices, (span,), mask.k_block, 0) & (first_row >= end)[:, None]
        return later


def drop_spans(name: str, *spans: Span, rows: Sequence[Span] | None = None) -> Ablation:
    """Attention to some spans of tokens [start, stop), from later rows or from given ones."""
    return Ablation(name, keys=tuple(spans), rows=None if rows is None else tuple(rows))


def drop_heads(name: str, heads: Sequence[Head], *, rows: Sequence[Span] | None = None) -> Ablation:
    """All attention of some (layer, head) pairs: their output is 0, whether dropped or zeroed."""
    return Ablation(name, heads=frozenset(heads), rows=None if rows is None else tuple(rows))


def drop_beyond(name: str, tokens: int, *, spare_sinks: int = 1, heads: Sequence[Head] | None = None) -> Ablation:
    """Attention farther back than a window of `tokens`, first blocks excepted."""
    return Ablation(name, beyond=tokens, spare_sinks=spare_sinks, heads=None if heads is None else frozenset(heads))


@dataclass(frozen=True, eq=False)
class AblationEffects:
    """A metric with nothing taken out and after each ablation.

    Attributes:
        base: the metric of the sparse run as it is.
        table: one row an ablation: name, blocks (kept blocks taken out), value, effect (base − value).
        how: "drop" (the rest of each row renormalises) or "zero" (it does not).
        about: model, T, k and pruned share, for titles; empty where that is not known.
    """

    base: float
    table: pd.DataFrame
    how: str
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.ablation` of this result."""
        from stream_lens import plots

        return plots.ablation(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object."""
        return json_of(self)


def ablate(
    model: Any,
    tokens: Int[Tensor, "batch position"],
    what: Ablation | Sequence[Ablation],
    metric: MetricFunction,
    config: StreamConfig | None = None,
    *,
    how: How = "drop",
    hold_masks: bool = True,
    last_logits: int | None = None,
) -> AblationEffects:
    """A metric without some blocks; one forward for each ablation and one without any.

    Args:
        model: HookedTransformer or TransformerBridge; streamed already, or streamed for this call.
        tokens: token ids, texts of one length.
        what: one ablation or several (`drop_spans`, `drop_heads`, `drop_beyond`, or an `Ablation`).
        metric: from the last logits to a scalar, see `stream_lens.circuits.metrics`.
        config: as for `stream`; only for a model that is not streamed yet.
        how: "drop" takes blocks out before the softmax and the rest of a row renormalises (attention knock-out); a row
            left with nothing gives 0. "zero" takes them out after it, and nothing renormalises.
        hold_masks: later layers keep the blocks that they keep without ablation. False lets them choose again.
        last_logits: how many positions' logits the metric reads; metrics of this package know.

    Raises:
        ValueError: a head, layer or token that does not exist is named; `how` is not known.
        RuntimeError: the model is streamed with observe=True, where an ablation has no effect.
    """
    tokens = tokens_within_context(model, text_tokens_only(tokens, "ablate"))
    ablations = [what] if isinstance(what, Ablation) else list(what)
    count = positions_read(metric, tokens, last_logits)
    with streamed_for_now(model, config), torch.no_grad():
        check_ablations(model, ablations, tokens.shape[-1], how)
        logits, masks = masks_of_run(model, tokens, count)
        base = float(scalar(metric, logits))
        rows = []
        for ablation in ablations:
            edits, taken = ablation_edits(ablation, masks, how, hold_masks)
            value = float(scalar(metric, run_edited(model, tokens, edits, count)))
            rows.append((ablation.name, sum(taken.values()), value, base - value))
    table = pd.DataFrame(rows, columns=["name", "blocks", "value", "effect"])
    return AblationEffects(base, table, how, about_masks(model.cfg.model_name, masks.values()))


def ablation_edits(
    ablation: Ablation, masks: Mapping[int, BlockMask], how: str, hold_masks: bool
) -> tuple[dict[int, Edit], dict[int, int]]:
    """An edit for each layer, and how many kept blocks it takes out there (of the masks given)."""
    chosen = {layer: ablation.chosen(mask, layer) for layer, mask in masks.items()}

    def of_layer(layer: int) -> Edit:
        def edit(pattern: SparsePattern) -> SparsePattern:
            if hold_masks:
                pattern, slots = pattern.with_mask(masks[layer]), chosen[layer]
            else:
                slots = ablation.chosen(pattern.mask, layer)
            if not bool(slots.any()):
                return pattern
            return pattern.drop(slots) if how == "drop" else pattern.scale(0.0, slots)

        return edit

    return {layer: of_layer(layer) for layer in masks}, {layer: int(slots.sum()) for layer, slots in chosen.items()}


def check_ablations(model: Any, ablations: Sequence[Ablation], n_tokens: int, how: str) -> None:
    """Raise ValueError where an ablation names what the streamed model or the input does not have."""
    if how not in ("drop", "zero"):
        raise ValueError(f"how={how!r} is not known: choose drop or zero.")
    if not ablations:
        raise ValueError("nothing to ablate was given: name at least one Ablation.")
    layers, heads = set(streamed_layers(model)), model.cfg.n_heads
    for ablation in ablations:
        for layer, head in ablation.heads or ():
            if layer not in layers or not 0 <= head < heads:
                raise ValueError(
                    f"{ablation.name}: there is no streamed head {(layer, head)}: layers are {sorted(layers)} with "
                    f"heads 0 to {heads - 1}."
                )
        for start, stop in (*(ablation.keys or ()), *(ablation.rows or ())):
            if not 0 <= start < stop <= n_tokens:
                raise ValueError(
                    f"{ablation.name}: tokens [{start}, {stop}) are not in the input: give 0 ≤ start < stop ≤ "
                    f"{n_tokens}."
                )
        missing = set(ablation.blocks or ()) - layers
        if missing:
            raise ValueError(f"{ablation.name}: layers {sorted(missing)} are not streamed; {sorted(layers)} are.")
        if ablation.beyond is not None and ablation.beyond < 0:
            raise ValueError(f"{ablation.name}: beyond={ablation.beyond} is not allowed: give 0 tokens or more.")


def _in_spans(block: Int[Tensor, "*n"], spans: Sequence[Span], size: int, offset: int) -> Bool[Tensor, "*n"]:
    """Which blocks of `size` tokens, counted from `offset`, hold a token of one of the spans."""
    first = offset + block * size
    inside = torch.zeros_like(block, dtype=torch.bool)
    for start, stop in spans:
        inside |= (first < stop) & (first + size > start)
    return inside & (block >= 0)

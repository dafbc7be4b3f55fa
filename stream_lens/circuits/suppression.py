"""Segment suppression: what later text loses when attention to one segment is cut, the causal side of vertical scores.

As in Thought Anchors (arXiv 2506.19143): for each segment j, attention to it is suppressed in all layers and heads,
and the log of KL(run ‖ suppressed run) of later tokens is averaged over each later segment i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.backend.long_inputs import text_tokens_only, tokens_within_context
from stream_lens.blocks import StreamConfig
from stream_lens.circuits.ablation import Ablation, How, ablation_edits, check_ablations, drop_spans
from stream_lens.circuits.edited_runs import (
    Edit,
    edited,
    forward,
    masks_of_run,
    streamed_for_now,
)
from stream_lens.circuits.metrics import kl_divergence, log_probabilities
from stream_lens.circuits.results import json_of
from stream_lens.circuits.runs import about_masks
from stream_lens.circuits.segments import Segments

# Logits of one chunk of positions, of which two sets are held at a time.
_CHUNK_BYTES = 128 << 20
_LEAST_KL = 1e-12


@dataclass(frozen=True, eq=False)
class SegmentSuppression:
    """Causal effects of segments on later ones.

    Attributes:
        log_kl: [suppressed, affected], mean over the affected segment's tokens of the natural log of the KL in nats
            (at least log 1e-12); NaN where the affected segment does not lie behind all the blocks taken out.
        suppressed, affected: numbers of the segments along both axes.
        blocks: how many kept blocks each suppression took out, over layers and heads.
        covered: tokens in the key blocks taken out for each segment; more than its own where blocks are shared.
        labels: of all segments.
        temperature: of both distributions.
        how: "drop" or "zero".
        about: model, T, k and pruned share, for titles; empty where that is not known.
    """

    log_kl: Float[np.ndarray, "suppressed affected"]
    suppressed: tuple[int, ...]
    affected: tuple[int, ...]
    blocks: tuple[int, ...]
    covered: tuple[int, ...]
    labels: tuple[str, ...]
    temperature: float
    how: str
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row a pair that has a number: suppressed, affected, log_kl, blocks."""
        at, other = np.nonzero(np.isfinite(self.log_kl))
        return pd.DataFrame(
            {
                "suppressed": np.array(self.suppressed, dtype=int)[at],
                "affected": np.array(self.affected, dtype=int)[other],
                "log_kl": self.log_kl[at, other],
                "blocks": np.array(self.blocks, dtype=int)[at],
            }
        )

    def mean_effect(self) -> Float[np.ndarray, " suppressed"]:
        """Mean log KL over the later segments, to hold beside vertical scores; NaN where there are none."""
        counts = np.isfinite(self.log_kl).sum(1)
        return np.where(counts > 0, np.nansum(self.log_kl, 1) / np.maximum(counts, 1), np.nan)

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.suppression` of this result."""
        from stream_lens import plots

        return plots.suppression(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object; NaN is null."""
        return json_of(self)


def segment_suppression(
    model: Any,
    tokens: Int[Tensor, "1 position"],
    segments: Segments,
    config: StreamConfig | None = None,
    *,
    suppressed: Sequence[int] | None = None,
    affected: Sequence[int] | None = None,
    temperature: float = 0.6,
    how: How = "drop",
    hold_masks: bool = True,
) -> SegmentSuppression:
    """Suppress one segment after the other and measure the later ones: one forward each, and one without.

    A segment's tokens are scored by the distributions that predict them, one position before. Memory is O(T): the
    last residual stream is kept, and logits are made for a chunk of positions at a time.

    Args:
        model: HookedTransformer or TransformerBridge; streamed already, or streamed for this call.
        tokens: token ids of the segments' text, BOS included.
        segments: of that text.
        config, how, hold_masks: as for `ablate`. Suppression takes whole key blocks: a small `k_block` fits better.
        suppressed, affected: numbers of segments, all by default.
        temperature: divides logits before the softmax (0.6 in Thought Anchors).

    Raises:
        ValueError: segments of another text; a segment that does not exist; a temperature that is not positive.
        RuntimeError: logits made from the residual stream differ from the model's own, or observe=True.
    """
    tokens = tokens_within_context(model, text_tokens_only(tokens, "segment_suppression"))
    rows = _checked("suppressed", suppressed, segments, tokens, temperature)
    columns = _checked("affected", affected, segments, tokens, temperature)
    log_kl = np.full((len(rows), len(columns)), np.nan)
    blocks, covered = [], []
    with streamed_for_now(model, config), torch.no_grad():
        _, masks = masks_of_run(model, tokens, 1)
        mask = next(iter(masks.values()))
        q_block, k_block = mask.q_block, mask.k_block
        base = _residual(model, tokens, {})
        for number, j in enumerate(rows):
            start, stop = segments.token_span(j)
            if start == stop:
                blocks.append(0)
                covered.append(0)
                continue
            ablation: Ablation = drop_spans(segments.labels[j], (start, stop))
            check_ablations(model, [ablation], tokens.shape[-1], how)
            edits, taken = ablation_edits(ablation, masks, how, hold_masks)
            end = -(-stop // k_block) * k_block
            blocks.append(sum(taken.values()))
            covered.append(min(end, tokens.shape[-1]) - start // k_block * k_block)
            after = _residual(model, tokens, edits)
            spans = [segments.token_span(i) for i in columns]
            # Query blocks that begin before the end of the blocks taken out keep their attention.
            cut = -(-end // q_block) * q_block
            log_kl[number] = _mean_log_kl(model, base, after, spans, cut, temperature)
    about = about_masks(model.cfg.model_name, masks.values())
    return SegmentSuppression(
        log_kl, tuple(rows), tuple(columns), tuple(blocks), tuple(covered), segments.labels, temperature, how, about
    )


def _checked(
    name: str, chosen: Sequence[int] | None, segments: Segments, tokens: Tensor, temperature: float
) -> list[int]:
    if tokens.shape != (1, segments.n_tokens):
        raise ValueError(
            f"the segments are of a text of {segments.n_tokens} tokens, and tokens are {list(tokens.shape)}: give the "
            "token ids [1, position] of the same text, with the same BOS."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not allowed: give a positive number.")
    chosen = list(range(len(segments)) if chosen is None else chosen)
    outside = [number for number in chosen if not 0 <= number < len(segments)]
    if outside:
        raise ValueError(f"{name} names segments {outside}: the text has segments 0 to {len(segments) - 1}.")
    return chosen


def _residual(model: Any, tokens: Tensor, edits: dict[int, Edit]) -> Float[Tensor, "position d_model"]:
    """What goes into the unembedding; checks that logits can be made from it afterwards."""
    kept: list[Tensor] = []
    with edited(model, edits), _unembedding_input(model, kept):
        logits = forward(model, tokens)
    if not torch.allclose(_logits(model, kept[0][-1:])[0], logits[0, -1], rtol=1e-3, atol=1e-3):
        raise RuntimeError(
            "logits made from the residual stream differ from the model's own: it does more after the unembedding "
            "than stream_lens knows. Please report it with the model's name."
        )
    return kept[0]


@contextmanager
def _unembedding_input(model: Any, kept: list[Tensor]) -> Iterator[None]:
    """Note all of the unembedding's input and let only the last position through."""

    def note(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0][0])
        return (args[0][:, -1:], *args[1:])

    handle = model.unembed.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _logits(model: Any, residual: Float[Tensor, "position d_model"]) -> Float[Tensor, "position vocab"]:
    logits = model.unembed(residual[None])[0]
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    if hasattr(model, "original_model"):
        cap = getattr(model.original_model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None or cap <= 0 else cap * torch.tanh(logits / cap)


def _mean_log_kl(
    model: Any, base: Tensor, after: Tensor, spans: list[tuple[int, int]], end: int, temperature: float
) -> Float[np.ndarray, " affected"]:
    """For each span that begins at `end` or later, the mean log KL of the positions that predict its tokens.

    Positions before `end` keep their attention, so the prediction of a token at `end` cannot move and is left out.
    """
    predicting = [range(max(start - 1, end), stop - 1) if start >= end else range(0) for start, stop in spans]
    wanted = sorted({position for positions in predicting for position in positions})
    values = np.full(len(base), np.nan)
    step = max(1, _CHUNK_BYTES // (model.cfg.d_vocab * 4))
    for first in range(0, len(wanted), step):
        at = torch.tensor(wanted[first : first + step], device=base.device)
        p, q = (log_probabilities(_logits(model, residual[at]) / temperature) for residual in (base, after))
        values[at.cpu().numpy()] = kl_divergence(p, q).clamp(min=_LEAST_KL).log().cpu().numpy()
    return np.array([values[list(positions)].mean() if len(positions) else np.nan for positions in predicting])

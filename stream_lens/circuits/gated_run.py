"""GatedRun: one input's run with fixed masks, as a function of a gate on every kept block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from stream_lens.backend.long_inputs import last_logits_only
from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import BlockMask, StreamConfig
from stream_lens.circuits.edited_runs import Edit, edited, forward, repeated, run_edited, streamed_for_now
from stream_lens.circuits.metrics import MetricFunction, scalar

Gates = dict[int, Float[Tensor, "batch head q_blocks k"]]
"""By layer: the factor on each kept block's probabilities after the softmax."""


@dataclass(frozen=True, eq=False)
class GatedRun:
    """A model, its input, a metric and the masks of every streamed layer, which gates and edits leave as they are.

    Attributes:
        model, tokens, metric, config: as given to the tool; config is None for a model that was streamed already.
        last_logits: how many positions' logits a run makes.
        masks: the kept blocks by layer.
    """

    model: Any
    tokens: Int[Tensor, "batch position"]
    metric: MetricFunction
    config: StreamConfig | None
    last_logits: int
    masks: Mapping[int, BlockMask]

    def ones(self) -> Gates:
        """Gates that change nothing, in float32 or wider."""
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        return {
            layer: torch.ones(mask.indices.shape, dtype=dtype, device=mask.indices.device)
            for layer, mask in self.masks.items()
        }

    def gradients(self, gates: Gates, *, recompute: bool) -> tuple[float, Gates]:
        """The metric at these gates, and its gradient in each of them, by one backward pass."""
        leaves = {layer: gate.detach().requires_grad_() for layer, gate in gates.items()}
        with ExitStack() as stack:
            stack.enter_context(frozen_parameters(self.model))
            stack.enter_context(streamed_for_now(self.model, self.config))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(edited(self.model, self._edits(leaves)))
            stack.enter_context(last_logits_only(self.model, self.last_logits))
            if recompute:
                stack.enter_context(blocks_recomputed(self.model))
            logits = forward(self.model, self.tokens)
            value = scalar(self.metric, logits)
            if not value.requires_grad:
                raise ValueError("the metric's value does not depend on the logits through autograd: do not detach it.")
            # Inside all contexts: blocks that run again need the edits again.
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        grads = {
            layer: torch.zeros_like(gate) if grad is None else grad
            for (layer, gate), grad in zip(leaves.items(), found, strict=True)
        }
        return float(value.detach()), grads

    def values(self, gates: Sequence[Gates], *, renormalise: bool = False) -> list[float]:
        """The metric at several settings of all gates, in one forward of as many copies of the input.

        With `renormalise` blocks of gate 0 are dropped before the softmax instead; other gates must then be 1.
        """
        times, batch = len(gates), self.tokens.shape[0]
        edits = {
            layer: _edit(repeated(mask, times), torch.cat([each[layer] for each in gates]), renormalise)
            for layer, mask in self.masks.items()
        }
        with streamed_for_now(self.model, self.config), torch.no_grad():
            logits = run_edited(self.model, self.tokens.repeat(times, 1), edits, self.last_logits)
        return [float(scalar(self.metric, part)) for part in logits.split(batch)]

    def _edits(self, gates: Gates) -> dict[int, Edit]:
        return {layer: _edit(mask, gates[layer], False) for layer, mask in self.masks.items()}


def _edit(mask: BlockMask, gate: Tensor, renormalise: bool) -> Edit:
    def edit(pattern: SparsePattern) -> SparsePattern:
        held = pattern.with_mask(mask)
        return held.keep(gate != 0) if renormalise else held.with_gate(gate)

    return edit


@contextmanager
def frozen_parameters(model: Any) -> Iterator[None]:
    """No weight asks for a gradient, so that none is made or kept for; given back as they were, after errors too."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def blocks_recomputed(model: Any) -> Iterator[None]:
    """Every block of the model keeps its input only and runs again in the backward pass (activation checkpointing)."""
    session = model.__dict__["_stream_session"]

    def recomputed(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            # A bridge's delegated attention streams only while the session knows that a forward runs.
            return checkpoint(
                forward, *args, use_reentrant=False, context_fn=lambda: (ExitStack(), session.running()), **kwargs
            )

        return run

    blocks = list(model.blocks)
    for block in blocks:
        block.__dict__["forward"] = recomputed(block.forward)
    try:
        # Stopping a recomputation early would leave a streamed layer in the middle of its forward.
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]

"""Gate attribution: how much every kept block of every head matters to a metric, by one backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.backend.install import is_streamed
from stream_lens.backend.long_inputs import text_tokens_only, tokens_within_context
from stream_lens.blocks import BlockMask, StreamConfig
from stream_lens.circuits.edited_runs import masks_of_run, streamed_for_now
from stream_lens.circuits.gated_run import GatedRun
from stream_lens.circuits.metrics import MetricFunction, positions_read
from stream_lens.circuits.results import json_of
from stream_lens.circuits.runs import about_masks

Edges = Int[np.ndarray, "edge 5"]
"""Kept blocks, one a row: position in the table of layers, batch row, head, query block, slot."""


@dataclass(frozen=True, eq=False)
class GateAttribution:
    """Scores of all kept blocks (edges): positive where the block raises the metric.

    A score estimates what the metric would lose if the block's probabilities were set to 0 with all else as it is
    (no renormalisation). It is linear in the gates, so it ranks blocks of small effect well and can miss the few that
    matter most: taking out the block that the answer is read from may cost many nats, while the metric hardly moves
    around a gate of 1, where the answer is certain. Two blocks that stand in for each other may also both get a small
    score. `check_by_ablation` tells how good the scores are here; look at its table, not at one correlation.

    Attributes:
        scores: by layer, [batch, head, q_blocks, k], aligned with `masks`; 0 in empty slots.
        masks: the kept blocks by layer.
        value: the metric of the run with every gate at 1.
        steps: points on the path of gates that were averaged over; 1 is the plain gradient at gate 1.
        run: model, input and metric, for `check_by_ablation` and `prune`.
        about: model, T, k and pruned share, for titles; empty where that is not known.
    """

    scores: dict[int, Float[Tensor, "batch head q_blocks k"]]
    masks: dict[int, BlockMask]
    value: float
    steps: int
    run: GatedRun = field(repr=False)
    about: str = ""

    def edges(self) -> tuple[Edges, Float[np.ndarray, " edge"]]:
        """Where every kept block lies, and its score."""
        places, scores = [], []
        for number, (layer, mask) in enumerate(self.masks.items()):
            kept = mask.kept.cpu()
            places.append(torch.nn.functional.pad(kept.nonzero(), (1, 0), value=number).numpy())
            scores.append(self.scores[layer].cpu()[kept].double().numpy())
        return np.concatenate(places), np.concatenate(scores)

    def to_frame(self) -> pd.DataFrame:
        """One row a kept block: layer, batch, head, q_block, k_block, score."""
        places, scores = self.edges()
        return frame_of_edges(self.masks, places).assign(score=scores)

    def top_edges(self, n: int = 20) -> pd.DataFrame:
        """The n kept blocks of the largest |score|, as `to_frame` gives them."""
        places, scores = self.edges()
        order = by_magnitude(scores)[:n]
        return frame_of_edges(self.masks, places[order]).assign(score=scores[order])

    def per_head(self) -> pd.DataFrame:
        """One row a head: layer, head, score (summed over its blocks and the batch), magnitude (sum of |score|)."""
        rows = []
        for layer, scores in self.scores.items():
            sums, magnitudes = scores.double().sum((0, 2, 3)), scores.double().abs().sum((0, 2, 3))
            rows += [(layer, head, float(sums[head]), float(magnitudes[head])) for head in range(len(sums))]
        return pd.DataFrame(rows, columns=["layer", "head", "score", "magnitude"])

    def per_layer(self) -> pd.DataFrame:
        """One row a layer: layer, score, magnitude, as in `per_head`."""
        return self.per_head().groupby("layer", as_index=False)[["score", "magnitude"]].sum()

    def check_by_ablation(
        self, n: int = 200, seed: int = 0, *, sample: Literal["uniform", "by_rank"] = "uniform", batch: int = 1
    ) -> Any:
        """Real ablations of a sample of blocks beside their scores; see `pruning.check_by_ablation`."""
        from stream_lens.circuits.pruning import check_by_ablation

        return check_by_ablation(self, n, seed, sample=sample, batch=batch)

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.attribution` of this result."""
        from stream_lens import plots

        return plots.attribution(self, **options)

    def to_json(self) -> str:
        """Value, steps, and the table of `to_frame` as columns, as a JSON object."""
        return json_of({"value": self.value, "steps": self.steps, "edges": self.to_frame()})


def gate_attribution(
    model: Any,
    tokens: Int[Tensor, "batch position"],
    metric: MetricFunction,
    config: StreamConfig | None = None,
    *,
    steps: int = 1,
    last_logits: int | None = None,
    masks: Mapping[int, BlockMask] | None = None,
    recompute: bool = True,
) -> GateAttribution:
    """Score every kept block of every head: gradient × gate, from one backward pass (after one forward for the masks).

    Every block's probabilities are multiplied by a gate of 1 after the softmax, and the score is the metric's gradient
    in that gate (attribution patching to zero, of attention blocks). The masks are those of the sparse run and do not
    move with the gates. Memory is O(T · k) for gates and O(T) for each layer's input; weights ask for no gradient
    meanwhile and only the last positions' logits are made.

    Args:
        model: HookedTransformer or TransformerBridge; streamed already, or streamed for this call.
        tokens: token ids, texts of one length.
        metric: from the last logits to a scalar, see `stream_lens.circuits.metrics`.
        config: as for `stream`, None for the defaults; only for a model that is not streamed yet.
        steps: above 1, integrated gradients: the mean gradient at that many midpoints of the path of all gates from 0
            to 1, at `steps` backward passes. Scores then sum up to the metric with all blocks less that with none,
            nearly. Not where the model normalises attention outputs (Gemma 2 and 3): there nothing changes along the
            path but close to 0, and steps=1 is the better estimate of single ablations.
        last_logits: how many positions' logits the metric reads; metrics of this package know.
        masks: blocks to attribute to instead of those that the run chooses, by layer, for every streamed layer.
        recompute: make each block's activations again in the backward pass. False is faster and takes O(T · layers)
            memory for activations.

    Raises:
        ValueError: the metric gives no scalar, or reads other logits than there are; masks lack a layer.
        RuntimeError: the model is streamed with observe=True, where gates have no effect.
    """
    tokens = tokens_within_context(model, text_tokens_only(tokens, "gate_attribution"))
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} is not allowed: give at least 1 backward pass.")
    count = positions_read(metric, tokens, last_logits)
    with streamed_for_now(model, config):
        _, chosen = masks_of_run(model, tokens, count)
        run = GatedRun(model, tokens, metric, None, count, _masks(chosen, masks))
        path = [1.0] if steps == 1 else [(step + 0.5) / steps for step in range(steps)]
        totals = {layer: torch.zeros_like(gate) for layer, gate in run.ones().items()}
        for point in path:
            gates = {layer: gate * point for layer, gate in run.ones().items()}
            value, grads = run.gradients(gates, recompute=recompute)
            for layer, grad in grads.items():
                totals[layer] += grad / steps
        if steps > 1:
            (value,) = run.values([run.ones()])
    held = GatedRun(model, tokens, metric, _config_for_later(model, config), count, run.masks)
    scores = {layer: total.masked_fill(~run.masks[layer].kept, 0.0) for layer, total in totals.items()}
    about = about_masks(model.cfg.model_name, run.masks.values())
    return GateAttribution(scores, dict(run.masks), value, steps, held, about)


def frame_of_edges(masks: Mapping[int, BlockMask], places: Edges) -> pd.DataFrame:
    """One row an edge: layer, batch, head, q_block, k_block."""
    number, batch, head, q_block, slot = places.T
    k_block = np.empty(len(places), dtype=np.int64)
    layers = list(masks)
    for n, layer in enumerate(layers):
        here = number == n
        indices = masks[layer].indices.cpu().numpy()
        k_block[here] = indices[batch[here], head[here], q_block[here], slot[here]]
    columns = {"layer": np.array(layers)[number], "batch": batch, "head": head, "q_block": q_block, "k_block": k_block}
    return pd.DataFrame(columns)


def by_magnitude(scores: Float[np.ndarray, " edge"]) -> Int[np.ndarray, " edge"]:
    """Edges by |score|, largest first; ties in order of place."""
    return np.argsort(-np.abs(scores), kind="stable")


def _masks(chosen: dict[int, BlockMask], given: Mapping[int, BlockMask] | None) -> dict[int, BlockMask]:
    if given is None:
        return chosen
    if set(given) != set(chosen):
        raise ValueError(f"masks must name the streamed layers {sorted(chosen)}; got {sorted(given)}.")
    return dict(sorted(given.items()))


def _config_for_later(model: Any, config: StreamConfig | None) -> StreamConfig | None:
    """What to stream the model with again: the masks are held, so the search is the cheapest one."""
    if is_streamed(model):
        return None
    config = config or StreamConfig()
    return replace(config, selector="window_sinks", k=config.forced_blocks, overrides={})

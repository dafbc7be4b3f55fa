"""trace: one text through a model, dense and sparse: what each answers, what was pruned, what the masks weigh."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Int
from torch import Tensor

from stream_lens.backend import SparseActivationCache, install, run_with_masks
from stream_lens.backend.greedy import greedy_tokens
from stream_lens.backend.long_inputs import text_tokens_only, tokens_within_context
from stream_lens.blocks import StreamConfig
from stream_lens.plots.masks import config_text, mask_figure

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Trace:
    """Result of `trace`.

    Attributes:
        cache: patterns of every streamed layer.
        sparse_answer, dense_answer: greedy continuations; the dense one is None when it was not asked for.
        expected: what a right answer contains, None for free text.
        spans: token spans worth marking (needle, question), by name.
        seconds: of the parts, by name.
    """

    cache: SparseActivationCache
    sparse_answer: str
    dense_answer: str | None
    expected: str | None
    spans: Mapping[str, Span] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return max(pattern.mask.kv_len for pattern in self.cache.patterns().values())

    def to_frame(self) -> pd.DataFrame:
        """One row a streamed layer: window (0 for global), k, shares pruned, bytes, heads that keep the first span.

        `pruned_causal` is of the causal half, `pruned_full` of all T², `pruned_visible` of what causality and the
        layer's window let a query see: in a layer with a window only the last says what Stream pruned.
        """
        rows = []
        for layer, pattern in self.cache.patterns().items():
            mask = pattern.mask
            batch, heads, query, key = mask.shape
            rows.append(
                {
                    "layer": layer,
                    "window": mask.window or 0,
                    "k": mask.k,
                    "pruned_causal": mask.sparsity("causal"),
                    "pruned_full": mask.sparsity("full"),
                    "pruned_visible": mask.sparsity("visible"),
                    "mask_bytes": pattern.nbytes,
                    "dense_bytes": batch * heads * query * key * pattern.dtype.itemsize,
                    **{f"heads_keeping_{name}": self.heads_keeping(layer, name) for name in list(self.spans)[:1]},
                }
            )
        return pd.DataFrame(rows)

    def heads_keeping(self, layer: int, span: str) -> int:
        """How many heads of the layer keep at least one block of the span for the last query block."""
        mask = self.cache.patterns()[layer].mask
        start, stop = self.spans[span]
        last = mask.indices[0, :, -1]
        kept = (last >= start // mask.k_block) & (last <= (stop - 1) // mask.k_block)
        return int(kept.any(-1).sum())

    def interesting_heads(self, count: int = 4) -> list[tuple[int, int]]:
        """(layer, head) whose last query block gives most to the first span; without spans, most to distant blocks."""
        scored = []
        for layer, pattern in self.cache.patterns().items():
            mask, mass = pattern.mask, pattern.block_mass
            last, share = mask.indices[0, :, -1], mass[0, :, -1]
            if self.spans:
                start, stop = next(iter(self.spans.values()))
                wanted = (last >= start // mask.k_block) & (last <= (stop - 1) // mask.k_block)
            else:
                wanted = (last > 0) & (last < mask.k_blocks - 2)
            score = (share * wanted).sum(-1)
            scored += [(float(score[head]), layer, head) for head in range(mask.shape[1])]
        scored.sort(key=lambda item: (-item[0], item[1], item[2]))
        return [(layer, head) for _, layer, head in scored[:count]]

    def plot(self, heads: list[tuple[int, int]] | None = None) -> go.Figure:
        """Block masks of some (layer, head); by default those that attend most to the marked span."""
        panels = []
        for layer, head in heads or self.interesting_heads():
            pattern = self.cache.patterns()[layer]
            kind = "global" if pattern.mask.window is None else f"window {pattern.mask.window}"
            panels.append((f"layer {layer}, head {head} ({kind})", pattern.mask, pattern.block_mass, head))
        info = self.cache.info
        frame = self.to_frame()
        title = (
            f"{info.model_name}: kept key blocks, T = {self.n_tokens}, {config_text(info.config)}<br><sup>"
            f"{frame.pruned_causal.mean():.1%} of the causal half pruned over {len(frame)} layers; "
            "colour: share of a query's attention; white: dropped</sup>"
        )
        return mask_figure(panels, title, spans=self.spans)


def trace(
    model: Any,
    tokens: Int[Tensor, "1 position"],
    config: StreamConfig | None = None,
    *,
    answer_tokens: int = 12,
    dense: bool = True,
    expected: str | None = None,
    spans: Mapping[str, Span] | None = None,
    on_step: Callable[[str], None] = lambda step: None,
    on_layer: Callable[[int], None] | None = None,
    **choices: Any,
) -> Trace:
    """Run one text sparse, and dense beside it.

    Args:
        model: HookedTransformer or TransformerBridge, not streamed.
        tokens: ids of the whole text.
        config, **choices: as for `stream`.
        answer_tokens: how many tokens each greedy continuation has.
        dense: also let the dense model answer, at O(T²).
        expected, spans: what a right answer contains, and token spans to mark.
        on_step, on_layer: told what begins, and which layer has its pattern: for progress bars.

    Raises:
        TypeError: `tokens` are no token ids.
        ValueError: more than one text, or less than one answer token.
    """
    tokens = tokens_within_context(model, text_tokens_only(tokens, "trace"))
    if tokens.shape[0] != 1:
        raise ValueError(f"trace takes one text; got {tokens.shape[0]}: call it for each.")
    if answer_tokens < 1:
        raise ValueError(f"answer_tokens={answer_tokens} is not allowed: ask for at least 1.")
    seconds: dict[str, float] = {}

    def timed(step: str, run: Callable[[], Any]) -> Any:
        on_step(step)
        start = time.perf_counter()
        result = run()
        seconds[step] = time.perf_counter() - start
        return result

    streamed = install(model, config, **choices)
    try:
        _, cache = timed("sparse run with cache", lambda: run_with_masks(model, tokens, on_layer=on_layer))
        sparse = timed("sparse answer", lambda: greedy_tokens(model, tokens, answer_tokens))
    finally:
        streamed.uninstall()
    answer = timed("dense answer", lambda: greedy_tokens(model, tokens, answer_tokens)) if dense else None
    return Trace(
        cache=cache,
        sparse_answer=_text(model, sparse),
        dense_answer=None if answer is None else _text(model, answer),
        expected=expected,
        spans=dict(spans or {}),
        seconds=seconds,
    )


def _text(model: Any, tokens: Tensor) -> str:
    return model.tokenizer.decode(tokens[0].tolist())

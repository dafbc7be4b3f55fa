"""Plain transformers models, without TransformerLens: for nnsight, hooks of one's own, or generation at length.

transformers dispatches attention by name (its AttentionInterface). "stream_lens" is registered there and is the model's
implementation while it runs; patterns are handed to a function of the caller's and kept for reading.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from stream_lens.backend import delegated, lazy_mask
from stream_lens.backend.architectures import TESTED
from stream_lens.backend.choices import configured, require_kernel, wanted_layers
from stream_lens.backend.layer import StreamedLayer
from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.refusal import UnsupportedArchitectureError
from stream_lens.backend.session import Session
from stream_lens.blocks import StreamConfig
from stream_lens.blocks.kernel_choice import Kernel

OnPattern = Callable[[int, SparsePattern], SparsePattern | None]


@dataclass(eq=False)
class StreamedTransformers:
    """A transformers model being streamed.

    Attributes:
        model: the model that was given.
        config: what its layers keep.
        patterns: each layer's pattern in the last forward, as `on_pattern` left it.
    """

    model: Any
    config: StreamConfig
    patterns: dict[int, SparsePattern] = field(default_factory=dict)


@contextmanager
def stream_transformers(
    model: Any,
    config: StreamConfig | None = None,
    *,
    on_pattern: OnPattern | None = None,
    kernel: Kernel = "auto",
    allow_untested: bool = False,
    **choices: Any,
) -> Iterator[StreamedTransformers]:
    """Run a plain transformers causal language model with block-sparse attention for the length of a `with` block.

    For a TransformerLens model use `stream`, which keeps its hooks.

    Args:
        model: a transformers model whose attention goes through its AttentionInterface; with nnsight, the wrapped one.
        config, **choices: as for `stream`.
        on_pattern: called with the layer's number and its pattern between softmax and values; what it returns (or its
            changes in place) takes effect.
        kernel, allow_untested: as for `stream`.

    Raises:
        UnsupportedArchitectureError: the model's attention cannot be streamed this way; the message says why.
        RuntimeError: the model is streamed already.
        ValueError: a choice is out of range, or a layer does not exist.
        TypeError: the model is part of a TransformerBridge.
    """
    config = configured(config, choices, also="on_pattern, kernel or allow_untested")
    require_kernel(kernel)
    modules = _attention_modules(model, allow_untested)
    if any("_streamed_layer" in module.__dict__ for _, module in modules):
        raise RuntimeError("this model is streamed already: leave that `with` block first.")
    wanted = wanted_layers(config, [number for number, _ in modules], model.config.num_attention_heads)
    streamed = StreamedTransformers(model, config)
    session = Session(model, [])
    try:
        _install(session, streamed, modules, wanted, on_pattern, kernel)
        yield streamed
    finally:
        session.restore()


def _attention_modules(model: Any, allow_untested: bool) -> list[tuple[int, Any]]:
    name = type(model).__name__
    if name not in TESTED and not allow_untested:
        raise UnsupportedArchitectureError(
            f"{name} is untested with stream_lens: pass allow_untested=True to try it, and compare logits at a k of "
            "all blocks with the dense ones first."
        )
    found = []
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise TypeError("this model is part of a TransformerBridge: use stream_lens.stream on the bridge.")
    for module in model.modules():
        if not (type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int)):
            continue
        if not getattr(module, "is_causal", True):
            raise UnsupportedArchitectureError(f"{name} cannot be streamed: {type(module).__name__} is not causal.")
        source = inspect.getsource(sys.modules[type(module).__module__])
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            raise UnsupportedArchitectureError(
                f"{name} cannot be streamed: {type(module).__name__} does not go through transformers' "
                "AttentionInterface."
            )
        found.append((module.layer_idx, module))
    if not found:
        raise UnsupportedArchitectureError(f"{name} cannot be streamed: no attention layers were found in it.")
    return found


def _install(
    session: Session,
    streamed: StreamedTransformers,
    modules: list[tuple[int, Any]],
    wanted: set[int],
    on_pattern: OnPattern | None,
    kernel: Kernel,
) -> None:
    lazy_mask.register()
    delegated.register()
    config, model = streamed.config, streamed.model

    def tell(number: int, pattern: SparsePattern) -> SparsePattern:
        given = None if on_pattern is None else on_pattern(number, pattern)
        pattern = pattern if given is None else given
        kept: Any = pattern.detach()
        streamed.patterns[number] = kept
        return pattern

    for number, module in modules:
        if number not in wanted:
            session.mark(module, "_dense_implementation", model.config._attn_implementation or "eager")
            continue
        layer = StreamedLayer(number, f"layer {number}", config, kernel)
        session.layers.append(layer)
        session.mark(module, "_streamed_layer", layer)
        session.mark(module, "_stream_on_pattern", tell)
    session.watch(model)

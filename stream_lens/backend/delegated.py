"""Attention that transformers runs: its AttentionInterface hands us q, k, v, and we fire the bridge's hook_pattern.

In dense TransformerLens a delegated component fires hook_pattern, then hook_attn_scores with the same probabilities,
after the fact, and discards edits. Here hook_attn_scores comes first, as everywhere else, and hook_pattern stands
between selection and output, so edits take effect. The same function serves models without any bridge.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stream_lens.backend.layer import StreamedLayer, attend, refuse_backward_hooks
from stream_lens.backend.lazy_mask import IMPLEMENTATION, LazyMask
from stream_lens.backend.lazy_scores import LazyScores, Steps
from stream_lens.backend.scores import Scores
from stream_lens.blocks import ScoreRule


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for the implementation "stream_lens": out [batch, query, head, d_head] and no weights."""
    layer: StreamedLayer | None = module.__dict__.get("_streamed_layer")
    if layer is None:
        return _dense(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if dropout > 0:
        raise RuntimeError(f"{layer.name}: attention dropout cannot run sparse: call model.eval() first.")
    for name in ("position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{layer.name}: attention with a {name} cannot be streamed.")
    offset, window, key_mask = key.shape[2] - query.shape[2], None, None
    if isinstance(attention_mask, LazyMask):
        offset, window, key_mask = attention_mask.offset, attention_mask.window, attention_mask.key_mask
    elif attention_mask is not None:
        raise NotImplementedError(f"{layer.name}: a custom 4-D attention mask was given; give the 2-D padding mask.")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    scores = Scores(query, key, ScoreRule(scale, offset, window, kwargs.get("softcap"), key_mask, kwargs.get("s_aux")))
    bridge = module.__dict__.get("_stream_bridge")
    if bridge is not None:
        refuse_backward_hooks(layer, bridge[0])
        lazy = LazyScores(Steps(query, key, layer, offset=offset))
        if bridge[0].hook_attn_scores(lazy) is not lazy:
            raise layer.score_edit_error()
    pattern: Any = layer.make_pattern(scores, query.dtype)
    if bridge is not None:
        pattern = bridge[0].hook_pattern(pattern)
    if (on_pattern := module.__dict__.get("_stream_on_pattern")) is not None:
        pattern = on_pattern(layer.number, pattern)
    return attend(layer, pattern, value).transpose(1, 2).contiguous(), None


def _dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    implementation = module.__dict__.get("_dense_implementation")
    if implementation is None:
        raise RuntimeError(
            f"{type(module).__name__} runs the attention implementation {IMPLEMENTATION!r} without being streamed: use "
            "stream_lens.stream(model, …), or stream_lens.stream_transformers for a model without TransformerLens."
        )
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.dense(implementation)
    scaling, dropout = args
    run: Any = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if run is None:  # eager functions live in each model's own file
        import sys

        run = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if run is None:
        raise RuntimeError(f"{type(module).__name__} has no {implementation} attention that stream_lens could find.")
    return run(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def register() -> None:
    """Tell transformers of the attention function; doing so twice is harmless."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)

"""Long inputs: the masks of a run with the last positions' logits only, what it will take, and no silent cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.backend.install import install, is_streamed
from stream_lens.backend.sparse_cache import SparseActivationCache
from stream_lens.blocks import ScoreRule, StreamConfig
from stream_lens.blocks.selection import prepared

NamesFilter = str | Sequence[str] | Callable[[str], bool]


def run_with_masks(
    model: Any,
    text_or_tokens: str | list[str] | Int[Tensor, "batch position"],
    config: StreamConfig | None = None,
    *,
    names_filter: NamesFilter | None = None,
    last_logits: int = 1,
    prepend_bos: bool | None = None,
    on_layer: Callable[[int], None] | None = None,
    **choices: Any,
) -> tuple[Float[Tensor, "batch last_logits vocab"], SparseActivationCache]:
    """One sparse forward of a long input: its last logits, and a cache of every layer's pattern.

    Unlike `model.run_with_cache` it caches nothing but streamed layers' patterns unless asked for more, makes logits of
    the last positions only (all positions of 8k tokens of Gemma 3 are 8.6 GB), and refuses a text longer than the
    context, where TransformerLens would cut it.

    Args:
        model: HookedTransformer or TransformerBridge; streamed already, or streamed for this call.
        text_or_tokens: a text, several (padded as the model's tokenizer does, the padding masked), or token ids.
        config, **choices: as for `stream`; only for a model that is not streamed yet.
        names_filter: what to cache besides patterns: a name, names, or a function of a name.
        last_logits: how many positions' logits to make.
        prepend_bos: for text; None takes the model's default.
        on_layer: called with the layer's number when its pattern is made, for progress bars.

    Raises:
        ValueError: the input is longer than the model's context, or choices are given for a streamed model.
        TypeError: the input is neither text nor token ids.
    """
    given: Any = tokens_within_context(model, text_or_tokens, prepend_bos)
    options: dict[str, Any] = {}
    if isinstance(text_or_tokens, list):  # a bridge makes the attention mask of padded texts from the texts alone
        given, options = text_or_tokens, {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    if is_streamed(model):
        if config is not None or choices:
            raise ValueError("the model is streamed already, so config and choices cannot take effect: leave them out.")
        return _run(model, given, options, names_filter, last_logits, on_layer)
    streamed = install(model, config, **choices)
    try:
        return _run(model, given, options, names_filter, last_logits, on_layer)
    finally:
        streamed.uninstall()


def tokens_within_context(
    model: Any, text_or_tokens: str | list[str] | Tensor, prepend_bos: bool | None = None
) -> Int[Tensor, "batch position"]:
    """Token ids of the whole text.

    Raises:
        ValueError: the model has fewer positions, where TransformerLens would cut; there are no tokens.
        TypeError: neither text nor token ids.
    """
    if isinstance(text_or_tokens, Tensor):
        tokens = text_tokens_only(text_or_tokens, "a model")
    elif isinstance(text_or_tokens, str) or (
        isinstance(text_or_tokens, list) and all(isinstance(text, str) for text in text_or_tokens)
    ):
        options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        tokens = model.to_tokens(text_or_tokens, truncate=False, **options)
    else:
        raise TypeError(
            f"a {type(text_or_tokens).__name__} was given: give a text, a list of texts, or a tensor of token ids "
            "[batch, position]."
        )
    if 0 in tokens.shape:
        raise ValueError("the input has no tokens: give at least one.")
    n_ctx = getattr(model.cfg, "n_ctx", None)
    if n_ctx and tokens.shape[-1] > n_ctx:
        raise ValueError(
            f"the input has {tokens.shape[-1]} tokens and the model's context is {n_ctx}: give a shorter text, or load "
            f"the model with a larger n_ctx if it has the positions (load_model(…, n_ctx={tokens.shape[-1]}))."
        )
    return tokens.to(model.cfg.device) if getattr(model.cfg, "device", None) else tokens


def text_tokens_only(tokens: Any, tool: str) -> Int[Tensor, "batch position"]:
    """`tokens` as [batch, position]; `TypeError` for anything but token ids."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.ndim not in (1, 2):
        given = (
            f"a {tokens.dtype} tensor of shape {list(tokens.shape)}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise TypeError(f"{tool} takes token ids [batch, position] (model.to_tokens(text)); got {given}.")
    return tokens if tokens.ndim == 2 else tokens[None]


@contextmanager
def last_logits_only(model: Any, count: int) -> Iterator[None]:
    """The model's logits, and what follows, cover the last `count` positions only."""
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"last_logits={count} is not allowed: ask for at least 1 position.")
    handle = model.unembed.register_forward_pre_hook(lambda _, args: (args[0][:, -count:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _run(
    model: Any,
    given: Tensor | list[str],
    options: dict[str, Any],
    names_filter: NamesFilter | None,
    last_logits: int,
    on_layer: Callable[[int], None] | None,
) -> tuple[Tensor, SparseActivationCache]:
    layers = model.__dict__["_stream_session"].layers
    patterns = {f"{layer.name}.hook_pattern" for layer in layers}  # not the T × T ones of layers that run dense

    def wanted(name: str) -> bool:
        return name in patterns or _passes(names_filter, name)

    hooks = []
    if on_layer is not None:
        hooks = [(f"{layer.name}.hook_pattern", _teller(on_layer, layer.number)) for layer in layers]
    with torch.no_grad(), last_logits_only(model, last_logits), model.hooks(fwd_hooks=hooks):
        return model.run_with_cache(given, names_filter=wanted, **options)


def _teller(on_layer: Callable[[int], None], number: int) -> Callable[..., None]:
    def tell(pattern: Tensor, hook: Any) -> None:
        on_layer(number)

    return tell


def _passes(names_filter: NamesFilter | None, name: str) -> bool:
    if names_filter is None:
        return False
    if isinstance(names_filter, str):
        return name == names_filter
    return names_filter(name) if callable(names_filter) else name in names_filter


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a sparse `run_with_masks` needs, and what dense `run_with_cache` would need for patterns alone.

    Attributes:
        weights: the model's parameters.
        masks: block indices and masses of all streamed layers.
        queries_keys: what cached patterns refer to (none with keep_scores=False).
        activations: about the largest working set of one layer, and the logits asked for.
        dense_patterns: scores and patterns that dense TransformerLens would cache.
    """

    weights: int
    masks: int
    queries_keys: int
    activations: int
    dense_patterns: int

    @property
    def total(self) -> int:
        return self.weights + self.masks + self.queries_keys + self.activations


def memory_estimate(
    model: Any, n_tokens: int, config: StreamConfig | None = None, *, batch: int = 1, last_logits: int = 1
) -> MemoryEstimate:
    """What a run over `n_tokens` will take, before it is run.

    A mass threshold is counted at its maximum. The sliding windows of a bridge, which leave fewer blocks to keep, are
    not known here: the real masks may then be smaller.
    """
    config, cfg = config or StreamConfig(), model.cfg
    layers = range(cfg.n_layers) if config.layers is None else config.layers
    heads, kv_heads = cfg.n_heads, getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    slots = sum(_slots(cfg, n_tokens, config, layer) for layer in layers)
    size = next(model.parameters()).element_size()
    d_mlp = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    width = 4 * cfg.d_model + 3 * d_mlp + 3 * heads * cfg.d_head
    return MemoryEstimate(
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        masks=batch * heads * -(-n_tokens // config.q_block) * slots * 8,  # an int32 index and a float32 mass
        queries_keys=len(layers) * batch * n_tokens * (heads + kv_heads) * cfg.d_head * size,
        activations=batch * (n_tokens * width + last_logits * cfg.d_vocab) * size,
        dense_patterns=2 * len(layers) * batch * heads * n_tokens**2 * size,
    )


def _slots(cfg: Any, n_tokens: int, config: StreamConfig, layer: int) -> int:
    """Slots per query block of one layer's mask, which the search knows from sizes alone."""
    is_local = getattr(cfg, "use_local_attn", False) and cfg.attn_types[layer] == "local"
    rule = ScoreRule(1.0, 0, cfg.window_size if is_local else None)
    sizes = torch.empty(1, cfg.n_heads, n_tokens, 1, device="meta")
    return prepared(sizes, sizes, rule, config, layer).slots

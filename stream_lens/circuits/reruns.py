"""The texts of a cache run once more: with another selector at the same budget, or dense. What controls are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from stream_lens.backend.greedy import greedy_tokens
from stream_lens.backend.install import is_streamed, stream
from stream_lens.backend.long_inputs import run_with_masks
from stream_lens.backend.pattern_data import padded_left
from stream_lens.backend.sparse_cache import SparseActivationCache
from stream_lens.blocks import StreamConfig
from stream_lens.circuits.kept_probabilities import holds_scores
from stream_lens.circuits.runs import mean_pruned

CONTROLS = ("exhaustive", "window_sinks", "random")
"""Selectors that every study is held to at its own budget: the oracle, and two that do not look at queries and keys."""

DENSE = "dense"


def rerun(model: Any, cache: SparseActivationCache, run: str) -> SparseActivationCache:
    """The patterns of the cache's texts under another selector with all else (observe too) as it was, or under "dense".

    The dense run is observed with every block kept, so its masses are the dense pattern's, block by block; it takes
    O(T²) time and O((T / block)²) memory. Queries and keys are kept where the cache has them.

    Raises:
        RuntimeError: the model is streamed.
        ValueError: the cache does not say what it ran on or kept, or is of another model; an unknown selector.
    """
    tokens, config = run_of(cache, model)
    choices = _choices(config, run, tokens.shape[-1], cache.info.observe)
    scores = any(holds_scores(pattern) for pattern in cache.patterns().values())
    return run_with_masks(model, tokens, keep_scores=scores, **choices)[1]


def answers(model: Any, cache: SparseActivationCache, run: str, count: int) -> tuple[str, ...]:
    """Each of the cache's texts gone on with greedily in such a run: the text's repr, or ids without a tokenizer."""
    tokens, config = run_of(cache, model)
    if run == DENSE:
        grown = greedy_tokens(model, tokens.to(_device(model)), count)
    else:
        with stream(model, **_choices(config, run, tokens.shape[-1], cache.info.observe)):
            grown = greedy_tokens(model, tokens.to(_device(model)), count)
    tokenizer = getattr(model, "tokenizer", None)
    return tuple(str(row) if tokenizer is None else repr(tokenizer.decode(row)) for row in grown.tolist())


def run_of(cache: SparseActivationCache, model: Any) -> tuple[Int[Tensor, "batch position"], StreamConfig]:
    """The token ids and choices of the run that made the cache, checked to be able to run on the model."""
    if is_streamed(model):
        raise RuntimeError("controls stream the model in one way after the other: leave the `with` block first.")
    info = getattr(cache, "info", None)
    if info is None or info.tokens is None or info.config is None:
        raise ValueError(
            "this cache does not say which tokens were run and what was kept, so there is nothing to run again: give "
            "the cache of a streamed run of text or token ids."
        )
    if hasattr(model, "original_model") and any(any(padded_left(each.data_)) for each in cache.patterns().values()):
        raise ValueError(
            "this cache is of texts padded on the left, and a bridge runs token ids without a mask of the padding: "
            "cache with model.tokenizer.padding_side = 'right', or one text at a time."
        )
    heads = {pattern.mask.shape[1] for pattern in cache.patterns().values()}
    layers = max(cache.patterns(), default=-1)
    cfg = model.cfg
    if layers >= cfg.n_layers or heads != {cfg.n_heads} or int(info.tokens.max()) >= cfg.d_vocab:
        raise ValueError(
            f"the cache is of {info.model_name or 'a model'} (layers to {layers}, {sorted(heads)} heads) and the model "
            f"given has {cfg.n_layers} layers of {cfg.n_heads} heads and {cfg.d_vocab} tokens: give the cache's model."
        )
    return info.tokens, info.config


def pruned(caches: Iterable[SparseActivationCache]) -> dict[str, float]:
    """Shares pruned, means over layers and caches: of the causal half, and of what each layer's window shows."""
    masks = [mask for cache in caches for mask in cache.masks().values()]
    return {"pruned_causal": mean_pruned(masks, "causal"), "pruned_visible": mean_pruned(masks, "visible")}


def noting_pruned(caches: Iterable[SparseActivationCache], shares: list[dict[str, float]]) -> Iterator[Any]:
    """The caches as they come, each one's `pruned` added to `shares`, so that none has to be held."""
    for cache in caches:
        shares.append(pruned([cache]))
        yield cache


def _choices(config: StreamConfig, run: str, n_tokens: int, observe: bool) -> dict[str, Any]:
    if run != DENSE:
        return {"config": replace(config, selector=run), "observe": observe}
    every = max(-(-n_tokens // config.k_block), config.forced_blocks)
    # Every selector keeps the same where all is kept: take the cheapest.
    return {"config": replace(config, selector="window_sinks", k=every, overrides={}), "observe": True}


def _device(model: Any) -> Any:
    return next(model.parameters()).device

"""Hand patterns to other tools: CircuitsVis for short texts. (flex_attention: `to_flex` and `from_flex`.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stream_lens.backend import SparseActivationCache, SparsePattern

LARGEST = 1024
"""Tokens that CircuitsVis can draw: it takes dense T × T attention into the page."""


def circuitsvis_attention(
    cache: SparseActivationCache | SparsePattern,
    tokens: Sequence[str],
    layer: int | None = None,
    *,
    heads: slice | list[int] = slice(None),
    batch: int = 0,
) -> Any:
    """`circuitsvis.attention.attention_patterns` of one layer: a widget for notebooks.

    Args:
        cache: a cache, with `layer`; or a pattern.
        tokens: the text's tokens as strings (`model.to_str_tokens`).
        heads: which to show.
        batch: which row of a batch.

    Raises:
        ImportError: circuitsvis is not installed.
        ValueError: more than 1,024 tokens, a number of tokens that is not the pattern's, or no layer for a cache.
    """
    try:
        from circuitsvis.attention import attention_patterns
    except ImportError as error:
        raise ImportError("drawing with CircuitsVis needs it installed: pip install circuitsvis.") from error
    if isinstance(cache, SparsePattern):
        pattern = cache
    elif layer is None:
        raise ValueError(f"say which layer to draw: the cache has {list(cache.patterns())}.")
    else:
        pattern = cache.patterns()[layer]
    query, key = pattern.shape[-2:]
    if key > LARGEST:
        raise ValueError(
            f"the pattern has {key} keys, and CircuitsVis draws dense patterns of up to {LARGEST}: use "
            "stream_lens.plots for longer texts, or stream a shorter one."
        )
    if len(tokens) != query:
        raise ValueError(f"{len(tokens)} tokens were given for a pattern of {query} queries.")
    dense = pattern.to_dense(heads=heads)
    dense = dense[batch] if dense.ndim == 4 else dense
    return attention_patterns(tokens=list(tokens), attention=dense.detach().float().cpu())

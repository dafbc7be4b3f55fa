"""The report of a trace: one HTML file with its text, its table of layers and every head's mask. No network needed."""

from __future__ import annotations

import base64
import html
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from stream_lens.files import written_aside
from stream_lens.trace import Trace

__all__ = ["write_report"]

_DECADES = 4  # shares below 10⁻⁴ of a row look alike


def write_report(trace: Trace, path: str | os.PathLike[str], tokenizer: Any) -> Path:
    """Write the first text of a trace as one self-contained page, put in place whole.

    A head is picked in a grid of small masks, in the table of layers, or by the page's address (`report.html#5.1`).
    Pointing at a cell of its mask lights the query and key text; a click holds them and marks every other head that
    keeps the block; a click on a word lights all that its query block keeps. Masks are stored as int16 or int32 block
    indices and one byte of log share each, O(T · k) a head; shares are right to 2%.

    Args:
        trace: of `stream_lens.trace.trace`.
        path: of the file.
        tokenizer: with `decode`, for the text of the tokens.

    Raises:
        ValueError: the cache has no token ids or no patterns.
        NoScoresError: a pattern's masses are not known (`SparsePattern.block_mass`).
    """
    cache = trace.cache
    if cache.info.tokens is None or not cache.patterns():
        raise ValueError("a report needs token ids and patterns: trace token ids, with hook_pattern cached.")
    data = {
        "tokens": [tokenizer.decode([token]) for token in cache.info.tokens[0].tolist()],
        "spans": {name: list(span) for name, span in trace.spans.items()},
        "layers": [_layer(layer, pattern) for layer, pattern in cache.patterns().items()],
        "first": list(trace.interesting_heads(1)[0]),
        "table": json.loads(trace.to_frame().to_json(orient="records")),
        "answers": {"dense": trace.dense_answer, "sparse": trace.sparse_answer, "expected": trace.expected},
    }
    title = f"{cache.info.model_name}: kept key blocks, T = {trace.n_tokens}"
    template = files("stream_lens.report").joinpath("template.html").read_text(encoding="utf-8")
    # In JSON every "<" lies within a string, where \u003c means the same and cannot end the script.
    plain = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = template.replace("{{title}}", html.escape(title)).replace("{{data}}", plain)
    return written_aside(path, lambda aside: aside.write_text(page, encoding="utf-8"))


def _layer(layer: int, pattern: Any) -> dict[str, Any]:
    mask = pattern.mask
    indices = mask.indices[0].cpu().numpy()
    dtype = np.dtype("<i2" if mask.k_blocks < 2**15 else "<i4")
    # The last query block may be short, so each is divided by the queries that it really holds.
    first = np.arange(mask.q_blocks)[:, None] * mask.q_block
    queries = np.minimum(first + mask.q_block, mask.q_len) - first
    share = (pattern.block_mass[0].detach().float().cpu().numpy() / queries).clip(10.0**-_DECADES, 1)
    levels = np.rint(1 + 254 * (1 + np.log10(share) / _DECADES)).astype(np.uint8)
    return {
        "layer": layer,
        "window": mask.window,
        "heads": indices.shape[0],
        "k": mask.k,
        "q_blocks": mask.q_blocks,
        "k_blocks": mask.k_blocks,
        "q_block": mask.q_block,
        "k_block": mask.k_block,
        "offset": mask.offset,
        "pruned": mask.sparsity("causal"),
        "bytes_each": dtype.itemsize,
        "indices": [_base64(head.astype(dtype)) for head in indices],
        "levels": [_base64(head) for head in levels],
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")

"""A streamed run of a tiny model, with queries and keys kept, for figures."""

from __future__ import annotations

from typing import Any

import torch

import stream_lens as sl
from tests.backend.tiny_models import VOCAB, tiny_bridge


def tiny_run(tokens: int, name: str = "Gemma3ForCausalLM", **choices: Any) -> sl.SparseActivationCache:
    """Patterns of every layer; layers of Gemma 3 alternate between a window of 24 keys and none."""
    ids = torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    _, cache = sl.run_with_masks(tiny_bridge(name), ids, **{"q_block": 8, "k_block": 8, "k": 4, **choices})
    return cache

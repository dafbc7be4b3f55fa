"""The model's own greedy continuation, dense or streamed, without logits of every position."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stream_lens.backend.install import with_whole_kv_cache
from stream_lens.backend.long_inputs import last_logits_only


def greedy_tokens(model: Any, tokens: Int[Tensor, "batch position"], count: int) -> Int[Tensor, "batch count"]:
    """The `count` tokens that the model most expects after `tokens`, through its KV cache; stops at no end token.

    Raises:
        ValueError: `count` tokens more do not fit into the model's context.
    """
    n_ctx = getattr(model.cfg, "n_ctx", None)
    if n_ctx and tokens.shape[-1] + count > n_ctx:
        raise ValueError(f"{tokens.shape[-1]} tokens and {count} more do not fit into the model's context of {n_ctx}.")
    with torch.no_grad(), last_logits_only(model, 1), with_whole_kv_cache(model):
        grown = model.generate(
            tokens,
            max_new_tokens=count,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        )
    return grown[:, tokens.shape[-1] :]

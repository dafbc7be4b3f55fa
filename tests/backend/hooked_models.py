"""Tiny random HookedTransformers, one for each way that TransformerLens 3.x makes an attention pattern."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 96
WINDOW = 24
_LLAMA = {
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 16,
    "n_key_value_heads": 2,
}
_LOCAL = {"attn_types": ["local", "global", "local"], "use_local_attn": True, "window_size": WINDOW}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gpt2": {"act_fn": "gelu", "normalization_type": "LN", "positional_embedding_type": "standard"},
    "softcap": {**_LLAMA, "attn_scores_soft_cap": 5.0},
    "local": {**_LLAMA, **_LOCAL},
    "attn_result": {**_LLAMA, "use_attn_result": True},
    "split_qkv": {**_LLAMA, "use_split_qkv_input": True},
    "ungrouped": {**_LLAMA, "ungroup_grouped_query_attention": True},
    "inverse_layer": {"act_fn": "gelu", "normalization_type": "LN", "scale_attn_by_inverse_layer_idx": True},
    "float64": {**_LLAMA, "dtype": torch.float64},
}


def hooked_model(variant: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode, with weights large enough that masks matter."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 3, "d_model": 64, "n_ctx": 512, "d_head": 16, "n_heads": 4, "d_mlp": 96, "d_vocab": VOCAB}
    model = HookedTransformer(HookedTransformerConfig(**{**sizes, **VARIANTS[variant], **changes}))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1))
    return model.eval()


def tokens_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

"""Which attention components of TransformerBridge are served, which are refused and why, and what is tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TESTED: dict[str, str] = {
    "Gemma2ForCausalLM": "soft-capped scores, sliding windows",
    "Gemma3ForCausalLM": "sliding windows, q/k norms",
    "GPT2LMHeadModel": "joint q, k, v",
    "GPTNeoXForCausalLM": "joint q, k, v, partial rotary",
    "GptOssForCausalLM": "attention sinks, sliding windows",
    "LlamaForCausalLM": "grouped heads (SmolLM2 is one)",
    "MistralForCausalLM": "sliding windows",
    "OPTForCausalLM": "delegated to transformers",
    "Qwen2ForCausalLM": "biases on q, k, v",
    "Qwen3ForCausalLM": "q/k norms",
}
"""Architectures whose bridge is tested against dense, and what is particular about them: see `tests/backend`."""


@dataclass(frozen=True)
class AttentionKind:
    """How an attention component is streamed, or why it cannot be."""

    delegated: bool = False
    reason: str | None = None


_REFUSED = {
    "MLAAttentionBridge": "multi-head latent attention keeps no keys and values that a block search could read",
    "GlmMoeDsaAttentionBridge": "multi-head latent attention keeps no keys and values that a block search could read",
    "ALiBiJointQKVAttentionBridge": "ALiBi adds a bias to every score, which the block search does not know",
    "MPTALiBiAttentionBridge": "ALiBi adds a bias to every score, which the block search does not know",
    "BloomAttentionBridge": "ALiBi adds a bias to every score, which the block search does not know",
    "CodeGenAttentionBridge": "CodeGen makes its own T × T mask",
    "T5Gemma2MergedAttentionBridge": "it has cross-attention",
}
_RECONSTRUCTED = {
    "PositionEmbeddingsAttentionBridge": "forward",
    "JointQKVPositionEmbeddingsAttentionBridge": "_reconstruct_attention",
    "JointQKVAttentionBridge": "_reconstruct_attention",
}


def attention_kind(attn: Any) -> AttentionKind:
    """Served if its class computes attention with a method that stream_lens knows, unchanged by a subclass."""
    names = [cls.__name__ for cls in type(attn).__mro__]
    for name in names:
        if name in _REFUSED:
            return AttentionKind(reason=_REFUSED[name])
    if getattr(attn, "is_cross_attention", False):
        return AttentionKind(reason="it has cross-attention")
    if not getattr(attn, "is_causal", True):
        return AttentionKind(reason="it is an encoder: its attention is not causal")
    for name, method in _RECONSTRUCTED.items():
        for cls in type(attn).__mro__:
            if cls.__name__ == name and _is_inherited(type(attn), cls, method):
                return AttentionKind()
    base = next((cls for cls in type(attn).__mro__ if cls.__name__ == "AttentionBridge"), None)
    if base is not None and _is_inherited(type(attn), base, "forward"):
        if getattr(attn, "original_component", None) is None:
            return AttentionKind(reason="its attention wraps no transformers module")
        return AttentionKind(delegated=True)
    return AttentionKind(reason=f"its attention component {names[0]} has a forward of its own, which is untested")


def _is_inherited(cls: type, base: type, method: str) -> bool:
    return getattr(cls, method) is getattr(base, method)

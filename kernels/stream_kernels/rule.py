"""What turns q · k into a visible attention score, apart from q and k themselves."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class ScoreRule:
    """One layer's scores: ``score = softcap · tanh(scale · q·k / softcap)``, and who sees whom.

    Query row ``i`` stands at absolute position ``offset + i``; key ``j`` at position ``j``. Key ``j`` is
    visible to row ``i`` when ``j <= offset + i`` (causal), ``j > offset + i - window`` (sliding window, as in
    TransformerLens and transformers) and ``key_mask[batch, j]`` (False marks padding).

    Attributes:
        scale: factor on q · k, such as ``d_head ** -0.5``.
        offset: absolute position of the first query: ``key_len - query_len`` when decoding with a KV cache.
        window: how many keys a row sees, itself included; None for all.
        softcap: Gemma 2's cap on scores; None for none.
        key_mask: [batch, key], False where the key is padding; None when nothing is padded.
        sinks: [head] logits that take part in the softmax and carry no value (GPT-OSS); None for none.
    """

    scale: float
    offset: int = 0
    window: int | None = None
    softcap: float | None = None
    key_mask: Bool[Tensor, "batch key"] | None = None
    sinks: Float[Tensor, "head"] | None = None

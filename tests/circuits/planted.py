"""Planted circuits: queries and keys set by hand, and a HookedTransformer whose weights copy along one known way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stream_lens.backend.pattern import SparsePattern
from tests.circuits.reference import streamed

TOKENS, BLOCK = 96, 8
NEEDLE, RELAY = (18, 22), (50, 52)


def looking(edges: dict[int, list[tuple[tuple[int, int], tuple[int, int]]]], heads: int = 3) -> tuple[Tensor, Tensor]:
    """Queries and keys with which, in each head, rows of one span look at keys of another and all else at token 0."""
    count = 1 + max(len(pairs) for pairs in edges.values())
    q, k = torch.zeros(2, 1, heads, TOKENS, count + 1, dtype=torch.float64)
    q[..., 0], k[..., 0, 0] = 6.0, 6.0
    for head, pairs in edges.items():
        for number, (rows, keys) in enumerate(pairs, start=1):
            q[0, head, slice(*rows), number] = 12.0
            k[0, head, slice(*keys), number] = 6.0
    return q, k


def planted_run(works: bool = True, **choices: Any) -> dict[int, SparsePattern]:
    """Layer 0, head 1: the relay looks at the needle. Layer 2, head 2: the last token looks at the relay.

    With works=False the relay looks nowhere.
    """
    options = {"q_block": BLOCK, "k_block": BLOCK, "k": 3, "query_stride": 1, **choices}
    last = (TOKENS - 1, TOKENS)
    edges: list[dict[int, Any]] = [{1: [(RELAY, NEEDLE)] if works else []}, {0: []}, {2: [(last, RELAY)]}]
    return {layer: streamed(*looking(each), layer=layer, **options) for layer, each in enumerate(edges)}


def induction_model(vocab: int = 24, n_ctx: int = 64) -> Any:
    """Two attention-only layers, one-hot throughout. Layer 0, head 1 copies the token before; layer 1, head 0 looks for
    positions whose token before is the current one: the last token reaches A through the position after A."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    d_head = max(vocab, n_ctx)
    width = 2 * vocab + n_ctx
    token, place, before = slice(0, vocab), slice(vocab, vocab + n_ctx), slice(vocab + n_ctx, width)
    sizes = {"n_layers": 2, "d_model": width, "n_ctx": n_ctx, "d_head": d_head, "n_heads": 2, "d_vocab": vocab}
    model = HookedTransformer(
        HookedTransformerConfig(**sizes, attn_only=True, normalization_type=None, use_attn_scale=False, seed=0)
    )
    for parameter in model.parameters():
        parameter.data.zero_()
    model.embed.W_E.data[:, token] = torch.eye(vocab)
    model.pos_embed.W_pos.data[:, place] = torch.eye(n_ctx)
    first, second = model.blocks[0].attn, model.blocks[1].attn
    first.W_Q.data[1, place, :n_ctx] = 30 * torch.eye(n_ctx).roll(-1, 1)
    first.W_K.data[1, place, :n_ctx] = torch.eye(n_ctx)
    first.W_V.data[1, token, :vocab] = torch.eye(vocab)
    first.W_O.data[1, :vocab, before] = torch.eye(vocab)
    second.W_Q.data[0, token, :vocab] = 30 * torch.eye(vocab)
    second.W_K.data[0, before, :vocab] = torch.eye(vocab)
    second.W_V.data[0, token, :vocab] = torch.eye(vocab)
    second.W_O.data[0, :vocab, token] = 3 * torch.eye(vocab)
    model.unembed.W_U.data[token, :] = torch.eye(vocab)
    return model.eval()


def induction_tokens(at: int = 13, length: int = 48, vocab: int = 24) -> Tensor:
    """Random filler with A, B at `at` and A once more at the end."""
    tokens = torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(0))
    tokens[0, at], tokens[0, at + 1], tokens[0, -1] = 1, 2, 1
    return tokens

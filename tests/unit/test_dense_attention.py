"""dense_attention against torch's own, and the masses that a mask's blocks hold of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import StreamConfig, block_sparse_attention, dense, select_blocks
from stream_lens.blocks.dense import dense_attention


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Operands of one attention, with a mask that drops blocks at random."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch, kv_heads, groups = (draw(st.integers(1, 2)) for _ in range(3))
    q_len, past, beyond = draw(st.integers(1, 40)), draw(st.integers(0, 20)), draw(st.integers(0, 5))
    kv_len, heads = past + q_len + beyond, kv_heads * groups
    key_mask = None
    if draw(st.booleans()):
        key_mask = torch.arange(kv_len).expand(batch, -1) >= draw(st.integers(0, kv_len))
        key_mask[0] = True
    rule = ScoreRule(
        0.7,
        past,
        draw(st.none() | st.integers(1, 30)),
        draw(st.none() | st.floats(1.0, 30.0)),
        key_mask,
        torch.randn(heads, generator=random, dtype=torch.float64) if draw(st.booleans()) else None,
    )
    q = torch.randn(batch, heads, q_len, 4, generator=random, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, kv_len, 4, generator=random, dtype=torch.float64)
    config = StreamConfig(draw(st.integers(1, 8)), draw(st.integers(2, 6)), 9, selector="random")
    return {"q": q, "k": k, "v": v, "rule": rule, "mask": select_blocks(q, k, config, rule)}


def reference(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The whole pattern at once; masses cut out of it block by block."""
    batch, heads, q_len, _ = q.shape
    groups = heads // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = rule.scale * q @ k.transpose(-1, -2)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    row, key = rule.offset + torch.arange(q_len)[:, None], torch.arange(k.shape[2])[None]
    hidden = (key > row) if rule.window is None else (key > row) | (key <= row - rule.window)
    hidden = hidden.expand(batch, 1, -1, -1)
    if rule.key_mask is not None:
        hidden = hidden | ~rule.key_mask[:, None, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    sinks = torch.full((heads,), -torch.inf, dtype=q.dtype) if rule.sinks is None else rule.sinks
    with_sink = torch.cat([scores, sinks[None, :, None, None].expand(batch, -1, q_len, 1)], -1)
    pattern = with_sink.softmax(-1).nan_to_num(0.0)[..., :-1]
    mass = torch.zeros(mask.indices.shape, dtype=q.dtype)
    for b, h, i, slot in mask.kept.nonzero().tolist():
        block = int(mask.indices[b, h, i, slot])
        rows = slice(i * mask.q_block, (i + 1) * mask.q_block)
        mass[b, h, i, slot] = pattern[b, h, rows, block * mask.k_block : (block + 1) * mask.k_block].detach().sum()
    return pattern @ v, with_sink.logsumexp(-1), mass


@settings(max_examples=80)
@given(cases(), st.sampled_from([1, 2000, 1 << 22]))
def test_it_is_dense_attention_whatever_the_chunk(case: dict[str, Any], chunk_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "CHUNK_BYTES", chunk_bytes)
        found = dense_attention(**case)
    for ours, expected in zip(found, reference(**case), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=30)
@given(cases(), st.integers(0, 99))
def test_gradients_are_those_of_dense_attention(case: dict[str, Any], seed: int) -> None:
    upstream = torch.randn(case["q"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def gradients(attention: Any) -> tuple[Tensor, ...]:
        q, k, v = (case[name].clone().requires_grad_() for name in "qkv")
        sinks = None if case["rule"].sinks is None else case["rule"].sinks.clone().requires_grad_()
        out = attention(q, k, v, replace(case["rule"], sinks=sinks), case["mask"])[0]
        return torch.autograd.grad(out, [x for x in (q, k, v, sinks) if x is not None], upstream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "CHUNK_BYTES", 1)
        found = gradients(dense_attention)
    for ours, expected in zip(found, gradients(reference), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, expected.nan_to_num(0.0), rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(cases())
def test_with_every_block_kept_sparse_and_dense_agree(case: dict[str, Any]) -> None:
    q, k, rule, mask = case["q"], case["k"], case["rule"], case["mask"]
    full = select_blocks(q, k, StreamConfig(mask.q_block, mask.k_block, 999), rule)
    whole = {**case, "mask": full}
    for ours, expected in zip(block_sparse_attention(**whole, kernel="torch"), dense_attention(**whole), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_the_mass_of_all_blocks_is_one_for_each_row() -> None:
    q, k = torch.randn(1, 2, 50, 8), torch.randn(1, 1, 50, 8)
    mask = select_blocks(q, k, StreamConfig(8, 8, 99))
    mass = dense_attention(q, k, k, ScoreRule(0.5), mask).block_mass.sum(-1)
    torch.testing.assert_close(mass, torch.tensor([8.0] * 6 + [2.0]).expand(1, 2, -1))


def test_values_may_be_narrower_and_not_repeated() -> None:
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8).bfloat16()
    mask = select_blocks(q, k, StreamConfig(8, 8, 2))
    plain = dense_attention(q, k, v, ScoreRule(0.5), mask)
    repeated = dense_attention(q, k.repeat_interleave(2, 1), v, ScoreRule(0.5), mask)
    assert plain.out.dtype == torch.bfloat16
    assert plain.logsumexp.dtype == torch.float32
    for a, b in zip(plain, repeated, strict=True):
        torch.testing.assert_close(a, b)


def test_only_out_is_differentiable() -> None:
    q = torch.randn(1, 1, 8, 4, requires_grad=True)
    k = torch.randn(1, 1, 8, 4)
    result = dense_attention(q, k, k, ScoreRule(0.5), select_blocks(q, k, StreamConfig(4, 4, 2)))
    assert [x.requires_grad for x in result] == [True, False, False]


def test_what_does_not_fit_is_refused() -> None:
    q = torch.randn(1, 4, 8, 4)
    mask = select_blocks(q, q, StreamConfig(4, 4, 2))
    with pytest.raises(ValueError, match=r"v \(1, 3, 8, 4\) must have the shape of k"):
        dense_attention(q, q, q[:, :3], ScoreRule(0.5), mask)
    with pytest.raises(ValueError, match="the mask has window None and the rule window 3"):
        dense_attention(q, q, q, ScoreRule(0.5, window=3), mask)

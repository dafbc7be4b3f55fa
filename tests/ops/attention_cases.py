"""Random block-sparse attention problems, eager torch's own answer, and how far a kernel may be from float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stream_kernels.block_attention.reference import block_attention_reference, visible_reference
from stream_kernels.rule import ScoreRule


@dataclass(frozen=True)
class Case:
    """One call of an attention operator, and what its gradients start from."""

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    rule: ScoreRule
    q_block: int
    k_block: int
    gate: Tensor | None
    grad_out: Tensor

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, ScoreRule]:
        return self.q, self.k, self.v, self.indices, self.rule

    @property
    def blocks(self) -> dict[str, Any]:
        return {"q_block": self.q_block, "k_block": self.k_block, "gate": self.gate}


def make_case(
    *,
    batch: int = 1,
    kv_heads: int = 1,
    groups: int = 1,
    query_len: int = 40,
    past: int = 0,
    d_head: int = 16,
    q_block: int = 16,
    k_block: int = 16,
    k: int = 2,
    window: int | None = None,
    softcap: float | None = None,
    padding: bool = False,
    sinks: bool = False,
    gate: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random tensors and random kept blocks, with empty slots anywhere.

    q, k, v and grad_out lie in [batch, row, head, d] memory between NaN: a kernel that reads past an edge shows it.
    """
    random = torch.Generator().manual_seed(seed)
    heads, key_len = kv_heads * groups, past + query_len

    def rows(head: int, length: int) -> Tensor:
        memory = torch.full((batch, length + 2, head, d_head + 8), torch.nan, dtype=dtype)
        values = torch.randn(batch, length, head, d_head, generator=random).to(dtype)
        memory[:, 1:-1, :, :d_head] = values
        return memory[:, 1:-1, :, :d_head].transpose(1, 2)

    q_blocks, k_blocks = -(-query_len // q_block), -(-key_len // k_block)
    drawn = torch.rand(batch, heads, q_blocks, k_blocks + k, generator=random).argsort(-1)[..., :k]
    indices = torch.where(drawn < k_blocks, drawn, -1).int()
    rule = ScoreRule(
        d_head**-0.5,
        offset=past,
        window=window,
        softcap=softcap,
        key_mask=torch.rand(batch, key_len, generator=random) > 0.3 if padding else None,
        sinks=torch.randn(heads, generator=random) if sinks else None,
    )
    gates = 2 * torch.rand(indices.shape, generator=random) - 0.5 if gate else None
    q, key, v, grad_out = (rows(*x) for x in ((heads, query_len), *[(kv_heads, key_len)] * 2, (heads, query_len)))
    return Case(q, key, v, indices, rule, q_block, k_block, gates, grad_out)


def of_pairs(case: Case, blocks: Tensor) -> Tensor:
    """[batch, head, q_blocks, k_blocks] to [batch, head, query, key]."""
    rows = blocks.repeat_interleave(case.q_block, 2)[:, :, : case.q.shape[2]]
    return rows.repeat_interleave(case.k_block, 3)[..., : case.k.shape[2]]


def dense_pattern(case: Case, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Dense probabilities [batch, head, query, key] under the block mask, and kept blocks one-hot [.., k, k_blocks]."""
    rule, groups = case.rule, q.shape[1] // k.shape[1]
    scores = rule.scale * (q @ k.repeat_interleave(groups, 1).transpose(-1, -2))
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    k_blocks = -(-k.shape[2] // case.k_block)
    kept = torch.nn.functional.one_hot(case.indices.long() + 1, k_blocks + 1)[..., 1:].to(q.dtype)
    visible = visible_reference(rule, q.shape[0], q.shape[2], k.shape[2])[:, None] & (of_pairs(case, kept.sum(-2)) > 0)
    lowest = torch.finfo(q.dtype).min
    sinks = torch.full((q.shape[1],), lowest, dtype=q.dtype) if rule.sinks is None else rule.sinks
    sink_column = sinks.to(q.dtype)[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    with_sink = torch.cat([scores.masked_fill(~visible, lowest), sink_column], -1)
    return with_sink.softmax(-1)[..., :-1] * visible, kept


def eager(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Dense attention under the block mask, and its gradients by autograd, in ``dtype``."""
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in (case.q, case.k, case.v))
    gate = (torch.ones(case.indices.shape) if case.gate is None else case.gate).to(dtype, copy=True).requires_grad_()
    pattern, kept = dense_pattern(case, q, k)
    gated = pattern * of_pairs(case, torch.einsum("bhqk,bhqkn->bhqn", gate, kept))
    out = gated @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    dq, dk, dv, dgate = torch.autograd.grad(out, (q, k, v, gate), case.grad_out.to(dtype))
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv, "dgate": dgate}


def sizes_before_cancelling(case: Case) -> dict[str, float]:
    """The largest sum of absolute terms behind each result: rounding shows against these, not against a difference.

    Where one key takes all, for example, dq is a difference of equal numbers, and 0.
    """
    q, k, v, grad = (x.double().abs() for x in (case.q, case.k, case.v, case.grad_out))
    batch, kv_heads, key_len, d_head = k.shape
    groups = q.shape[1] // kv_heads
    pattern, kept = dense_pattern(case, case.q.double(), case.k.double())
    gate = torch.ones(case.indices.shape).double() if case.gate is None else case.gate.double().abs()
    gated = pattern * of_pairs(case, torch.einsum("bhqk,bhqkn->bhqn", gate, kept))
    grad_pattern = grad @ v.repeat_interleave(groups, 1).transpose(-1, -2)
    grad_scores = gated * grad_pattern + pattern * (gated * grad_pattern).sum(-1, keepdim=True)
    grad_scores = case.rule.scale * grad_scores

    def of_keys(x: Tensor) -> Tensor:
        return x.reshape(batch, kv_heads, groups, key_len, d_head).sum(2)

    results = {
        "out": gated @ v.repeat_interleave(groups, 1),
        "dq": grad_scores @ k.repeat_interleave(groups, 1),
        "dk": of_keys(grad_scores.transpose(-1, -2) @ q),
        "dv": of_keys(gated.transpose(-1, -2) @ grad),
        "dgate": (pattern * grad_pattern).sum((-1, -2)),
    }
    return {name: float(x.max()) for name, x in results.items()}


def assert_as_close_as_eager(
    case: Case, ours: dict[str, Tensor], truth: dict[str, Tensor], *, roundings: int = 1
) -> None:
    """10 × eager's error in float32, 1.1 × in half precision, plus some roundings of the terms before they cancel."""
    dtype = case.q.dtype
    low, sizes = eager(case, dtype), sizes_before_cancelling(case)
    fudge, step = (10 if dtype == torch.float32 else 1.1), roundings * torch.finfo(dtype).eps / 2
    for name, result in ours.items():
        assert result.isfinite().all(), f"{name}: not finite, or never written"
        exact = truth[name]
        error, allowed = (result.double() - exact).abs().max(), (low[name].double() - exact).abs().max()
        bound = fudge * allowed + step * sizes[name]
        assert error <= bound, f"{name}: error {error}, eager's {allowed}, allowed {bound}"


def assert_forward_is_the_references(case: Case, out: Tensor, logsumexp: Tensor, mass: Tensor) -> dict[str, Tensor]:
    """Checks all of a forward's results but the closeness of ``out``; returns float64 results of the whole problem."""
    true_out, true_logsumexp, true_mass = block_attention_reference(*case.operands, **case.blocks)
    truth = eager(case, torch.float64)
    torch.testing.assert_close(truth["out"], true_out)
    assert out.dtype == case.q.dtype
    assert logsumexp.dtype == mass.dtype == torch.float32
    assert not logsumexp.isnan().any()
    torch.testing.assert_close(logsumexp.double(), true_logsumexp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass.double(), true_mass, rtol=1e-5, atol=1e-5)
    assert (mass[case.indices < 0] == 0).all()
    assert (out[logsumexp == -torch.inf] == 0).all()
    return truth

"""block_sparse_attention against attention computed one row and one key at a time, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import BlockMask, block_sparse_attention, torch_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one attention; `case` draws its tensors."""

    batch: int = 1
    kv_heads: int = 1
    groups: int = 1
    q_len: int = 12
    past: int = 0
    beyond: int = 0
    d_head: int = 4
    q_block: int = 4
    k_block: int = 4
    slots: int = 2
    window: int | None = None
    softcap: float | None = None
    padding: tuple[int, int] = (0, 0)
    sinks: bool = False
    gate: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask
    rule: ScoreRule
    gate: Tensor | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.mask, self.rule, self.gate


shapes = st.builds(
    Shape,
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    q_len=st.integers(1, 20),
    past=st.integers(0, 12),
    beyond=st.integers(0, 5),
    d_head=st.sampled_from([1, 4, 8]),
    q_block=st.integers(1, 8),
    k_block=st.integers(1, 8),
    slots=st.integers(1, 6),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.floats(0.5, 30.0),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    sinks=st.booleans(),
    gate=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)


def case_of(shape: Shape) -> Case:
    """Random tensors; every query block keeps a random number of random blocks, none included."""
    random = torch.Generator().manual_seed(shape.seed)
    heads, kv_len = shape.kv_heads * shape.groups, shape.past + shape.q_len + shape.beyond

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64).to(shape.dtype)

    q_blocks, k_blocks = -(-shape.q_len // shape.q_block), -(-kv_len // shape.k_block)
    indices = torch.full((shape.batch, heads, q_blocks, shape.slots), -1, dtype=torch.int32)
    for row in indices.view(-1, shape.slots):
        keep = int(torch.randint(0, min(shape.slots, k_blocks) + 1, (), generator=random))
        row[:keep] = torch.randperm(k_blocks, generator=random)[:keep].sort().values
    mask = BlockMask(indices, shape.q_block, shape.k_block, shape.q_len, kv_len, shape.past, shape.window)
    key_mask = None
    if any(shape.padding):
        key = torch.arange(kv_len)
        key_mask = ((key >= shape.padding[0]) & (key < kv_len - shape.padding[1])).repeat(shape.batch, 1)
        key_mask[0] = True  # the first batch row is the longest
    return Case(
        normal(shape.batch, heads, shape.q_len, shape.d_head),
        normal(shape.batch, shape.kv_heads, kv_len, shape.d_head),
        normal(shape.batch, shape.kv_heads, kv_len, shape.d_head),
        mask,
        ScoreRule(
            scale=0.7,
            offset=shape.past,
            window=shape.window,
            softcap=shape.softcap,
            key_mask=key_mask,
            sinks=normal(heads) if shape.sinks else None,
        ),
        normal(*indices.shape) if shape.gate else None,
    )


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, rule: ScoreRule, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One row at a time: list the keys it sees in kept blocks, softmax their scores, weigh their values."""
    batch, heads, q_len, _ = q.shape
    groups = heads // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    outs, sums = [], []
    mass = torch.zeros(mask.indices.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for row in range(q_len):
                position, i = rule.offset + row, row // mask.q_block
                keys, slots = [], []
                for slot, block in enumerate(mask.indices[b, h, i].tolist()):
                    if block < 0:
                        continue
                    for key in range(block * mask.k_block, min((block + 1) * mask.k_block, k.shape[2])):
                        inside = rule.window is None or key > position - rule.window
                        real = rule.key_mask is None or bool(rule.key_mask[b, key])
                        if key <= position and inside and real:
                            keys.append(key)
                            slots.append(slot)
                scores = rule.scale * k[b, h // groups, keys] @ q[b, h, row]
                if rule.softcap is not None:
                    scores = rule.softcap * torch.tanh(scores / rule.softcap)
                sink = scores.new_full((1,), -torch.inf) if rule.sinks is None else rule.sinks[h : h + 1].double()
                total = torch.cat([scores, sink]).logsumexp(0)
                probability = torch.zeros_like(scores) if total == -torch.inf else (scores - total).exp()
                for slot, p in zip(slots, probability.detach(), strict=True):
                    mass[b, h, i, slot] += p
                if gate is not None:
                    probability = probability * gate[b, h, i, slots].double()
                outs.append(probability @ v[b, h // groups, keys])
                sums.append(total)
    return torch.stack(outs).view(q.shape), torch.stack(sums).view(q.shape[:3]), mass


def assert_matches(given_: Any, case: Case) -> None:
    """Scores are made in float32 at least; only `out` is rounded to the inputs' precision."""
    out, logsumexp, mass = reference(*case.arguments)
    working = 1e-10 if case.q.dtype == torch.float64 else 3e-5
    rounding = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(case.q.dtype, 0.0)
    assert given_.out.dtype == case.q.dtype
    torch.testing.assert_close(given_.out.double(), out, rtol=working + rounding, atol=working + rounding / 4)
    torch.testing.assert_close(given_.logsumexp.double(), logsumexp, rtol=working, atol=working)
    torch.testing.assert_close(given_.block_mass.double(), mass, rtol=working, atol=working)


@settings(max_examples=150)
@given(shapes)
@example(Shape(padding=(5, 0), q_len=7))
@example(Shape(window=1, sinks=True, gate=True))
def test_torch_path_matches_the_row_by_row_reference(shape: Shape) -> None:
    case = case_of(shape)
    assert_matches(block_sparse_attention(*case.arguments, kernel="torch"), case)


@settings(max_examples=60)
@given(shapes)
def test_the_automatic_path_matches_it_too(shape: Shape) -> None:
    case = case_of(shape)
    tolerant = replace(case, gate=None) if shape.dtype == torch.bfloat16 else case
    assert_matches(block_sparse_attention(*tolerant.arguments), tolerant)


@settings(max_examples=60)
@given(shapes)
def test_gradients_match_those_of_the_reference(shape: Shape) -> None:
    case = case_of(replace(shape, dtype=torch.float64, q_len=min(shape.q_len, 9)))
    upstream = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(shape.seed), dtype=torch.float64)

    def gradients(attention: Any) -> list[Tensor | None]:
        q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
        sinks, gate = (None if x is None else x.clone().requires_grad_() for x in (case.rule.sinks, case.gate))
        inputs = [x for x in (q, k, v, sinks, gate) if x is not None]
        out = attention(q, k, v, case.mask, replace(case.rule, sinks=sinks), gate)[0]
        found = torch.autograd.grad(out, inputs, upstream, materialize_grads=True, allow_unused=True)
        return list(found)

    found = gradients(lambda *arguments: block_sparse_attention(*arguments, kernel="torch"))
    for ours, expected in zip(found, gradients(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(q_len=7, past=3, groups=2, gate=True, sinks=True, slots=3),
        Shape(q_len=6, window=3, softcap=2.0, batch=2, padding=(2, 0), gate=True),
    ],
    ids=["decode, GQA, sinks, gate", "window, soft-cap, padding, gate"],
)
def test_gradcheck(shape: Shape) -> None:
    case = case_of(shape)
    assert case.mask.kept.float().mean() > 0.3, "gradients of nothing would be checked"
    sinks = torch.zeros(case.q.shape[1], dtype=torch.float64) if case.rule.sinks is None else case.rule.sinks

    def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, sinks: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, case.mask, replace(case.rule, sinks=sinks), gate, kernel="torch").out

    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.gate, sinks) if x is not None]
    assert torch.autograd.gradcheck(attention, inputs)


def test_gradcheck_would_notice_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    path = block_sparse_attention.__globals__["choose_kernel"]("torch", torch.zeros(1))

    def too_large(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        dq, *rest = path.backward(*arguments, **options)
        return (1.01 * dq, *rest)

    wrong = replace(path, backward=too_large)
    monkeypatch.setitem(block_sparse_attention.__globals__, "choose_kernel", lambda *_: wrong)
    with pytest.raises(GradcheckError):
        test_gradcheck(Shape(q_len=7, past=3, groups=2, gate=True, sinks=True, slots=3))


def full_mask(q_len: int, kv_len: int, batch: int, heads: int, q_block: int, k_block: int) -> BlockMask:
    dense = torch.ones(batch, heads, q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    return BlockMask.from_dense(dense, q_block, k_block, offset=kv_len - q_len)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_len", "kv_len"), [(50, 50), (1, 50), (17, 50)])
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_all_blocks_are_dense_attention(q_len: int, kv_len: int, dtype: torch.dtype, kernel: Any) -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, q_len, 16, generator=random).to(dtype)
    k, v = (torch.randn(2, 2, kv_len, 16, generator=random).to(dtype) for _ in "kv")
    sparse = block_sparse_attention(q, k, v, full_mask(q_len, kv_len, 2, 4, 8, 16), kernel=kernel)
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), causal, enable_gqa=True
    )
    tolerance = 1e-5 + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(sparse.out.double(), dense, rtol=tolerance, atol=tolerance)


@settings(max_examples=30)
@given(shapes, st.integers(1, 4000))
def test_chunks_do_not_change_the_result(shape: Shape, chunk_bytes: int) -> None:
    case = case_of(replace(shape, dtype=torch.float64))
    sizes: dict[str, Any] = {"q_block": case.mask.q_block, "k_block": case.mask.k_block, "gate": case.gate}

    def both(chunk_bytes: int) -> list[Tensor]:
        inputs = (case.q, case.k, case.v, case.mask.indices, case.rule)
        out, logsumexp, mass = torch_attention.forward(*inputs, **sizes, chunk_bytes=chunk_bytes)
        grads = torch_attention.backward(
            *inputs, logsumexp, out, torch.ones_like(out), **sizes, chunk_bytes=chunk_bytes
        )
        return [out, logsumexp, mass, *grads]

    for small, whole in zip(both(chunk_bytes), both(1 << 30), strict=True):
        torch.testing.assert_close(small, whole, rtol=1e-11, atol=1e-11)


@settings(max_examples=40)
@given(shapes)
def test_a_gate_scales_one_block_and_renormalises_nothing(shape: Shape) -> None:
    case = case_of(replace(shape, dtype=torch.float64, gate=False))
    ones = torch.ones(case.mask.indices.shape, dtype=torch.float64)
    plain = block_sparse_attention(*case.arguments, kernel="torch")
    parts = torch.zeros_like(plain.out)
    for slot in range(case.mask.k):
        only = torch.zeros_like(ones)
        only[..., slot] = 1
        gated = block_sparse_attention(case.q, case.k, case.v, case.mask, case.rule, only, kernel="torch")
        parts += gated.out
        assert torch.equal(gated.logsumexp, plain.logsumexp)
        assert torch.equal(gated.block_mass, plain.block_mass)
    torch.testing.assert_close(parts, plain.out, rtol=1e-10, atol=1e-10)
    same = block_sparse_attention(case.q, case.k, case.v, case.mask, case.rule, ones, kernel="torch")
    torch.testing.assert_close(same.out, plain.out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_a_row_that_sees_nothing(sinks: bool, dtype: torch.dtype, kernel: Any) -> None:
    """Nothing kept, only later keys of the diagonal block kept, and a padded text: output 0 and gradients finite."""
    indices = torch.tensor([[[[-1], [1]]], [[[0], [0]]]], dtype=torch.int32)
    mask = BlockMask(indices, 4, 4, 8, 8, 0, 2)
    key_mask = torch.ones(2, 8, dtype=torch.bool)
    key_mask[1] = False
    rule = ScoreRule(1.0, window=2, key_mask=key_mask, sinks=torch.tensor([0.5], dtype=dtype) if sinks else None)
    q, k, v = (torch.randn(2, 1, 8, 4, dtype=dtype, requires_grad=True) for _ in "qkv")
    out, logsumexp, mass = block_sparse_attention(q, k, v, mask, rule, kernel=kernel)
    blind = torch.ones(2, 8, dtype=torch.bool)
    blind[0, 4:] = False
    assert out[blind[:, None]].count_nonzero() == 0
    assert (logsumexp[blind[:, None]] == (0.5 if sinks else -torch.inf)).all()
    assert mass[1].count_nonzero() == 0
    assert torch.isfinite(logsumexp[~blind[:, None]]).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_memory_layout_does_not_matter_and_inputs_are_left_alone(kernel: Any) -> None:
    case = case_of(Shape(q_len=11, groups=2, dtype=torch.float32, gate=True, sinks=True))
    expected = block_sparse_attention(*case.arguments, kernel=kernel)
    q, k, v = strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v)]
    copies = [x.clone() for x in strided]
    found = block_sparse_attention(q, k, v, case.mask, case.rule, case.gate, kernel=kernel)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(map(torch.equal, strided, copies))


def test_only_out_is_differentiable() -> None:
    case = case_of(Shape())
    out, logsumexp, mass = block_sparse_attention(case.q.requires_grad_(), case.k, case.v, case.mask, case.rule)
    assert out.requires_grad
    assert not logsumexp.requires_grad
    assert not mass.requires_grad


def test_without_a_rule_scale_offset_and_window_come_from_the_arguments() -> None:
    case = case_of(Shape(past=5, window=4, q_len=9, slots=3))
    rule = ScoreRule(case.q.shape[-1] ** -0.5, offset=5, window=4)
    assert_matches(block_sparse_attention(case.q, case.k, case.v, case.mask), replace(case, rule=rule))


GOOD = case_of(Shape(kv_heads=2, groups=2, window=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": GOOD.q[0]}, r"q and k must be \[batch, head, position, d_head\]; got shapes \(4, 12, 4\)"),
        ({"k": GOOD.k[..., :3]}, r"q \(1, 4, 12, 4\) and k \(1, 2, 12, 3\) must agree in batch and d_head"),
        ({"k": GOOD.k.repeat(1, 2, 1, 1)[:, :3]}, "4 query heads cannot share 3 key heads: query heads must be a mult"),
        ({"k": GOOD.k[:, :, :11]}, "queries at positions 0 to 11 need as many keys; got 11"),
        ({"v": GOOD.v[:, :1]}, r"v \(1, 1, 12, 4\) must have the shape of k \(1, 2, 12, 4\)"),
        ({"v": GOOD.v.float()}, "q, k and v must share one dtype; got torch.float64, torch.float64 and torch.float32"),
        ({"mask": replace(GOOD.mask, indices=GOOD.mask.indices[:, :2])}, r"the mask stands for .*\[1, 2, 12, 12\] at"),
        ({"rule": replace(GOOD.rule, offset=-1)}, "offset=-1 is not allowed: the first query stands at 0 or later"),
        ({"rule": replace(GOOD.rule, window=5)}, "the mask has window 4 and the rule window 5"),
        ({"rule": replace(GOOD.rule, window=0)}, "window=0 is not allowed"),
        ({"rule": replace(GOOD.rule, softcap=0.0)}, "softcap=0.0 is not allowed: give a positive cap or None"),
        ({"rule": replace(GOOD.rule, sinks=torch.zeros(3))}, r"sinks must have one logit per head, \[4\]; got \[3\]"),
        (
            {"rule": replace(GOOD.rule, key_mask=torch.ones(1, 11).bool())},
            r"key_mask must be .* = \[1, 12\]; got \[1, 11",
        ),
        ({"rule": replace(GOOD.rule, key_mask=torch.ones(1, 12).long())}, "key_mask must be bool; got torch.int64"),
        ({"gate": torch.ones(1, 4, 3, 1)}, r"gate must have one value per slot, \[1, 4, 3, 2\]; got \[1, 4, 3, 1\]"),
        ({"kernel": "cuda"}, "kernel='cuda' is not known: choose one of auto, triton, cpp, torch"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(change: dict, message: str) -> None:
    names = ("q", "k", "v", "mask", "rule", "gate")
    arguments = {**dict(zip(names, GOOD.arguments, strict=True)), "kernel": "torch"}
    block_sparse_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**{**arguments, **change})


def test_the_reference_can_tell_a_wrong_window() -> None:
    case = case_of(Shape(window=3, q_len=12, slots=3))
    found = block_sparse_attention(*case.arguments, kernel="torch")
    assert_matches(found, case)
    with pytest.raises(AssertionError):
        assert_matches(found, replace(case, rule=replace(case.rule, window=2)))

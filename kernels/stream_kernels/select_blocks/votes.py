"""What the selection kernel does with scores in hand: let the rows vote, and keep the best."""

from __future__ import annotations

import triton
import triton.language as tl

# How a query block's rows become one score per branch: `reduce` and `rank` of StreamConfig.
MAX: tl.constexpr = tl.constexpr(0)
MASS: tl.constexpr = tl.constexpr(1)
PEAK: tl.constexpr = tl.constexpr(2)


@triton.jit
def log2_sum(scores2, axis: tl.constexpr):
    """log2 of the sum of 2^scores2 along an axis; -inf of nothing."""
    top = tl.max(scores2, axis)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(scores2 - tl.expand_dims(shift, axis)), axis)
    return tl.where(total > 0.0, shift + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@triton.jit
def log2_add(a, b):
    top = tl.maximum(a, b)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2(a - shift) + tl.exp2(b - shift)
    return tl.where(total > 0.0, shift + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@triton.jit
def store_shares(
    strip,  # [branches, ROWS] base-2 logits, read
    scores,  # [branches], written
    branches,
    rows,
    votes,  # [ROWS]
    total2,  # [ROWS]: log2 of each row's mass over all branches and the blocks that are kept anyway
    REDUCE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One score per branch from its rows' softmax shares; -inf where no voting row sees the branch."""
    total2 = tl.where(total2 == float("-inf"), 0.0, total2)
    for tile in range(0, branches, LANES):
        branch = tile + tl.arange(0, LANES)
        there = (branch < branches)[None, :] & votes[:, None]
        logits2 = tl.load(strip + branch[None, :] * ROWS + rows[:, None], mask=there, other=float("-inf"))
        share = tl.exp2(logits2 - total2[:, None])
        score = tl.sum(share, 0) if REDUCE == MASS else tl.max(share, 0)
        seen = tl.max(logits2, 0) > float("-inf")
        tl.store(scores + branch, tl.where(seen, score, float("-inf")))


@triton.jit
def best(score, keep):
    """Bool [n]: the `keep` highest scores; ties go to the lower index and -inf is never kept.

    Builds the keep-th highest score from counts, four bits at a time. Sorting 128 branches instead spills registers,
    and takes minutes to compile for some GPUs.
    """
    valid = score > float("-inf")
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)  # -0.0 is no lower than 0.0
    order = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)  # unsigned, in the order of the floats
    order = tl.where(valid, order, 0)
    digits = tl.arange(0, 16).to(tl.uint32)
    threshold = tl.full([], 0, tl.uint32)
    shift = tl.full([], 28, tl.uint32)
    for _ in range(8):
        at_least = order[:, None] >= (threshold | (digits << shift))[None, :]
        enough = tl.sum(at_least.to(tl.int32), 0) >= keep
        threshold = threshold | (tl.max(tl.where(enough, digits, 0), 0) << shift)
        shift = shift - 4
    above = valid & (order > threshold)
    tied = valid & (order == threshold)
    room = keep - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))

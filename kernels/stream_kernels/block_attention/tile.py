"""What the three block-attention kernels do to one tile: load it, score it, decide who sees whom."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, row, row_ok, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """[rows, D_PAD] from rows of D contiguous numbers; zero outside."""
    column = tl.arange(0, D_PAD)
    ok = row_ok[:, None] if D == D_PAD else row_ok[:, None] & (column < D)[None, :]
    return tl.load(ptr + (row[:, None] * stride + column[None, :]), mask=ok, other=0.0)


@triton.jit
def load_columns(ptr, row, row_ok, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """[D_PAD, rows]: the transpose of `load_rows`."""
    column = tl.arange(0, D_PAD)
    ok = row_ok[None, :] if D == D_PAD else row_ok[None, :] & (column < D)[:, None]
    return tl.load(ptr + (row[None, :] * stride + column[:, None]), mask=ok, other=0.0)


@triton.jit
def store_rows(ptr, tile, row, row_ok, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    column = tl.arange(0, D_PAD)
    ok = row_ok[:, None] if D == D_PAD else row_ok[:, None] & (column < D)[None, :]
    tl.store(ptr + (row[:, None] * stride + column[None, :]), tile.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def tanh(x):
    """Within a few units in the last place everywhere: the exponential form alone cancels near zero.

    Written out because libdevice, which has an exact tanh, does not exist in the interpreter.
    """
    u = x * x
    near_zero = x * (10395.0 + u * (1260.0 + u * 21.0)) / (10395.0 + u * (4725.0 + u * (210.0 + u)))
    elsewhere = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.5, near_zero, elsewhere)


@triton.jit
def base2_scores(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """log2(e) times the score, so that the softmax is exp2 of it."""
    if HAS_SOFTCAP:
        return tanh(products * (scale / softcap)) * (softcap * LOG2_E)
    return products * (scale * LOG2_E)


@triton.jit
def softcap_slope(scores2, softcap):
    """d score / d (scale · q·k) = 1 - (score / softcap)², from the base-2 score."""
    capped = scores2 / (softcap * LOG2_E)
    return 1.0 - capped * capped


@triton.jit
def load_key_ok(key_mask_ptr, batch, key, key_ok, key_len, HAS_KEY_MASK: tl.constexpr):
    """Which keys of a tile exist and are no padding."""
    if HAS_KEY_MASK:
        mask_row = key_mask_ptr + batch.to(tl.int64) * key_len
        key_ok = key_ok & (tl.load(mask_row + key, mask=key_ok, other=0) != 0)
    return key_ok


@triton.jit
def visible(row_position, key, key_ok, window, HAS_WINDOW: tl.constexpr):
    """Causality and window; the arguments come shaped so that they broadcast, either way round."""
    seen = key_ok & (key <= row_position)
    if HAS_WINDOW:
        seen = seen & (key > row_position - window)
    return seen

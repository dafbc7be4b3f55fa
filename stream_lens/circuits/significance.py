"""Paired tests over many cells at once, corrected for their number (Benjamini and Hochberg)."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import numpy as np
import scipy.stats
from jaxtyping import Float

Test = Literal["wilcoxon", "sign", "permutation"]

_FLIPS = 10_000
_CELLS_AT_ONCE = 1 << 16


def check_test(test: str) -> None:
    """Raise ValueError for a test that is not known."""
    if test not in get_args(Test):
        raise ValueError(f"test={test!r} is not known: choose one of {', '.join(get_args(Test))}.")


def paired_p_values(
    differences: Float[np.ndarray, "pair cell"], test: Test, seed: int = 0
) -> Float[np.ndarray, " cell"]:
    """Two-sided p of each cell's mean (or sign) being 0; 1 where every pair's difference is 0.

    "wilcoxon" is the signed-rank test, "sign" the sign test (pairs without a difference left out), "permutation" flips
    the signs of whole pairs: all 2ⁿ ways up to 13 pairs, else 10,000 random ones.
    """
    found = np.ones(differences.shape[1])
    some = np.flatnonzero((differences != 0).any(0))
    for first in range(0, len(some), _CELLS_AT_ONCE):
        cells = some[first : first + _CELLS_AT_ONCE]
        found[cells] = _p_values(differences[:, cells].astype(float), test, seed)
    return found


def corrected(p_values: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " cell"]:
    """Benjamini and Hochberg's q values: keep those below α for a false discovery rate of α."""
    return scipy.stats.false_discovery_control(p_values) if len(p_values) else p_values


def _p_values(differences: Float[np.ndarray, "pair cell"], test: Test, seed: int) -> Float[np.ndarray, " cell"]:
    if test == "sign":
        more, less = (differences > 0).sum(0), (differences < 0).sum(0)
        return np.minimum(1.0, 2 * scipy.stats.binom.cdf(np.minimum(more, less), more + less, 0.5))
    if test == "wilcoxon":
        return _wilcoxon(differences)
    signs = _flips(len(differences), seed)
    exhaustive = len(signs) == 2 ** len(differences)
    totals = np.abs(differences.sum(0))
    as_large = np.zeros(differences.shape[1])
    for part in np.array_split(signs, max(1, len(signs) // 256)):
        as_large += (np.abs(part @ differences) >= totals * (1 - 1e-9)).sum(0)
    return as_large / len(signs) if exhaustive else (as_large + 1) / (len(signs) + 1)


def _wilcoxon(differences: Float[np.ndarray, "pair cell"]) -> Float[np.ndarray, " cell"]:
    """Zeros left out. Cells with as many others, tied or not, are tested together.

    scipy takes the exact distribution for all cells of a call or for none, so that a zero in one would cost them all.
    """
    other = differences != 0
    count = other.sum(0)
    sizes = np.sort(np.abs(differences), axis=0)
    tied = ((sizes[1:] == sizes[:-1]) & (sizes[1:] > 0)).any(0)
    found = np.ones(len(count))
    for pairs, ties in sorted(set(zip(count.tolist(), tied.tolist(), strict=True))):
        here = (count == pairs) & (tied == ties)
        values = differences[:, here].T[other[:, here].T].reshape(-1, pairs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found[here] = np.nan_to_num(scipy.stats.wilcoxon(values, axis=1).pvalue, nan=1.0)
    return found


def _flips(pairs: int, seed: int) -> Float[np.ndarray, "flip pair"]:
    if 2**pairs <= _FLIPS:
        return ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1) * 2.0 - 1
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(_FLIPS, pairs))

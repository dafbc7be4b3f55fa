"""Calibrated k: from how fast each head's attention mass is gathered, the k of every head within one total budget."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


def recall_curve(
    block_mass: Float[Tensor, "batch head q_blocks k"], forced: Bool[Tensor, "batch head q_blocks k"], most: int
) -> Float[Tensor, "head most"]:
    """Mean share of a row's attention that the best 1 … `most` kept blocks hold.

    Args:
        block_mass: share of a mask's blocks in the dense pattern, one row's mean: 0 to 1, 0 in empty slots.
        forced: the blocks that are kept whatever their mass; they come first.
        most: the largest k looked at, at least 1.

    Masses other than the forced ones fall with their rank, so each further block adds no more than the one before.
    """
    rank = torch.where(forced, torch.inf, block_mass)
    ordered = block_mass.gather(-1, rank.sort(dim=-1, descending=True, stable=True).indices)[..., :most]
    ordered = torch.nn.functional.pad(ordered, (0, most - ordered.shape[-1]))
    return rearrange(ordered, "b h i k -> h (b i) k").double().mean(1).cumsum(-1)


def allocate(curves: Float[Tensor, "heads most"], budget: float, fewest: int) -> Int[Tensor, "heads"]:
    """The k of every head that together gather the most mass with `budget` blocks a head on average.

    Gains fall with k, so taking the largest gains one block at a time is the best there is; ties go to the lower head.

    Args:
        curves: gathered mass at k = 1 … most, from `recall_curve`.
        budget: mean k over heads; the sum is rounded down.
        fewest: the least k of a head: the forced blocks.

    Raises:
        ValueError: the budget lies outside `fewest` to `most`.
    """
    heads, most = curves.shape
    if not 1 <= fewest <= budget <= most:
        raise ValueError(
            f"budget={budget} is not allowed: give a mean number of blocks from {fewest}, which are always kept, to "
            f"{most}, the most that was looked at."
        )
    gains = curves.diff(dim=-1)[:, fewest - 1 :]
    # Forced blocks may hold less than later ones; past them a rank's gain never grows, up to rounding.
    gains = gains.cummin(-1).values
    order = gains.flatten().sort(descending=True, stable=True).indices[: int(budget * heads) - fewest * heads]
    head = order // max(1, gains.shape[1])
    return fewest + torch.bincount(head, minlength=heads)

"""How many key blocks a query block may keep, where that is not one constant: the paper's open question, variable k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class FractionOfPrefix:
    """Keep a fraction of each query block's visible key blocks: late rows keep more than early ones.

    A constant k keeps k / n of row n, so it prunes late rows hardest (the paper's limit, section on future work). From
    4,000 tokens a fraction of 0.05, `minimum` 2, in every layer is the recommended budget for retrieval: it found all
    needles that dense attention finds but one of 84 (docs/selection.md).

    Attributes:
        fraction: in (0, 1].
        minimum: never fewer than this many blocks (nor fewer than the forced ones).
    """

    fraction: float
    minimum: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} is not allowed: give a share in (0, 1].")
        _require_blocks("minimum", self.minimum)

    def blocks(self, visible: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """Key blocks that rows with so many visible ones may keep: the fraction, rounded up."""
        # In float64, less its rounding error: 0.07 of 100 blocks is 7, though 0.07 * 100 > 7 in floating point.
        wanted = (visible.to(torch.float64) * self.fraction - 1e-9).ceil()
        return wanted.to(visible.dtype).clamp(min=self.minimum)

    def to_json(self) -> dict[str, Any]:
        return {"schedule": "fraction", **asdict(self)}


@dataclass(frozen=True)
class MassThreshold:
    """Keep the fewest blocks, best first, that hold a share of the attention mass found by the search.

    Attributes:
        mass: share in (0, 1] of the mass of the `maximum` best blocks found.
        maximum: never more than this many blocks.
    """

    mass: float
    maximum: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass={self.mass} is not allowed: give a share in (0, 1].")
        _require_blocks("maximum", self.maximum)

    def to_json(self) -> dict[str, Any]:
        return {"schedule": "mass", **asdict(self)}


KSchedule = FractionOfPrefix | MassThreshold


def schedule_from_json(plain: Mapping[str, Any]) -> KSchedule:
    """The schedule whose `to_json` gave `plain`."""
    values = {name: value for name, value in plain.items() if name != "schedule"}
    kinds: dict[str, type[FractionOfPrefix] | type[MassThreshold]] = {
        "fraction": FractionOfPrefix,
        "mass": MassThreshold,
    }
    if plain.get("schedule") not in kinds:
        raise ValueError(f"schedule {plain.get('schedule')!r} is not known: choose one of {', '.join(kinds)}.")
    return kinds[plain["schedule"]](**values)


def _require_blocks(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed: give a whole number of at least 1 block.")

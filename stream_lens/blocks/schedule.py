"""How many key blocks a query block may keep, where that is not one constant (the paper's open question: variable k)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FractionOfPrefix:
    """Keep a fraction of each query block's visible key blocks: late rows keep more than early ones.

    A constant k keeps k / n of row n, so it prunes late rows hardest (the paper's limit, section on future work).

    Attributes:
        fraction: in (0, 1].
        minimum: never fewer than this many blocks (nor fewer than the forced ones).
    """

    fraction: float
    minimum: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} is not allowed: give a share in (0, 1].")
        if self.minimum < 1:
            raise ValueError(f"minimum={self.minimum} is not allowed: give at least 1 block.")

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
        if self.maximum < 1:
            raise ValueError(f"maximum={self.maximum} is not allowed: give at least 1 block.")

    def to_json(self) -> dict[str, Any]:
        return {"schedule": "mass", **asdict(self)}


KSchedule = FractionOfPrefix | MassThreshold


def schedule_from_json(plain: Mapping[str, Any]) -> KSchedule:
    """The schedule whose `to_json` gave `plain`."""
    values = {name: value for name, value in plain.items() if name != "schedule"}
    kinds = {"fraction": FractionOfPrefix, "mass": MassThreshold}
    if plain.get("schedule") not in kinds:
        raise ValueError(f"schedule {plain.get('schedule')!r} is not known: choose one of {', '.join(kinds)}.")
    return kinds[plain["schedule"]](**values)

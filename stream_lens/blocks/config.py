"""StreamConfig: every choice that decides which blocks a run keeps."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stream_lens.blocks.schedule import FractionOfPrefix, KSchedule, MassThreshold, schedule_from_json

REPRESENTATIVES = ("first", "centre", "last", "strided", "mean", "mean_var")
"""What stands for a branch of several key blocks while it competes: see `stream_lens.blocks.branch_scores`."""

REDUCTIONS = ("max", "mass", "peak")
"""How scores of one branch over a query block's rows become one number: see `stream_lens.blocks.branch_scores`."""


@dataclass(frozen=True)
class StreamConfig:
    """Which key blocks each query block may keep, and how they are searched for.

    Attributes:
        q_block: queries per query block (the paper's b_q); 32 is about a sentence.
        k_block: keys per key block (b_k).
        k: key blocks kept per query block, forced ones included: an int, `FractionOfPrefix` or `MassThreshold`.
        selector: name in the registry: "stream" (the hierarchical search), "exhaustive" (the oracle),
            "window_sinks", "random", or one added with `register_selector`.
        representative: what stands for a branch in the search, one of `REPRESENTATIVES`.
        reduce: how a query block's rows vote in the rounds, one of `REDUCTIONS`.
        oversample: branches followed per block that will be kept. Above 1 the search ends with more single blocks than
            it may keep and ranks them by their exact scores (an extension of the paper, which has 1). Where fewer than
            four blocks are free, as many branches compete as for four.
        rank: the `reduce` of that exact final ranking, and of the selector "exhaustive".
        query_stride: score every n-th row of a query block, in the rounds and in the final ranking; "exhaustive" scores
            all rows.
        sink_blocks: first real key blocks always kept (the attention sink); they count inside k.
        local_blocks: key blocks before the diagonal always kept; they count inside k. The diagonal itself always is.
        layers: layers that run sparse, None for all; the others run dense.
        overrides: {(layer, head): k}, for the heads whose k differs; an int also where `k` is a schedule.
        seed: of the "random" selector.

    Raises:
        ValueError: a value is out of range; the message says what is allowed.
    """

    q_block: int = 32
    k_block: int = 32
    k: int | KSchedule = 16
    selector: str = "stream"
    representative: str = "mean_var"
    reduce: str = "mass"
    oversample: int = 6
    rank: str = "mass"
    query_stride: int = 4
    sink_blocks: int = 1
    local_blocks: int = 0
    layers: tuple[int, ...] | None = None
    overrides: Mapping[tuple[int, int], int] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("q_block", 1),
            ("k_block", 1),
            ("oversample", 1),
            ("query_stride", 1),
            ("sink_blocks", 0),
            ("local_blocks", 0),
            ("seed", 0),
        ):
            object.__setattr__(self, name, _whole_number(name, getattr(self, name), least))
        _require_choice("representative", self.representative, REPRESENTATIVES)
        _require_choice("reduce", self.reduce, REDUCTIONS)
        _require_choice("rank", self.rank, REDUCTIONS)
        if isinstance(self.k, MassThreshold):
            self._checked_k("k.maximum", self.k.maximum)
        elif not isinstance(self.k, FractionOfPrefix):
            object.__setattr__(self, "k", self._checked_k("k", self.k))
        self._own_overrides()
        self._own_layers()

    @property
    def forced_blocks(self) -> int:
        """The most key blocks that one query block keeps whatever their scores: sinks, local and diagonal."""
        return self.sink_blocks + self.local_blocks + diagonal_blocks(self.q_block, self.k_block)

    def _own_overrides(self) -> None:
        """Check `overrides` and keep a copy: a frozen config must not change with the caller's dict."""
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides={self.overrides!r} is not allowed: give a dict, as in {{(3, 0): 32}}.")
        own = {}
        for where, k in self.overrides.items():
            if not (isinstance(where, tuple) and len(where) == 2):
                raise ValueError(f"overrides has the key {where!r}: give (layer, head) pairs, as in {{(3, 0): 32}}.")
            layer = _whole_number(f"the layer of overrides[{where}]", where[0], 0)
            head = _whole_number(f"the head of overrides[{where}]", where[1], 0)
            own[layer, head] = self._checked_k(f"overrides[{where}]", k)
        object.__setattr__(self, "overrides", own)

    def _own_layers(self) -> None:
        if self.layers is None:
            return
        try:
            layers = tuple(self.layers)
        except TypeError:
            raise ValueError(f"layers={self.layers!r} is not allowed: give several, as in (0, 5), or None.") from None
        layers = tuple(_whole_number("a layer of layers", layer, 0) for layer in layers)
        object.__setattr__(self, "layers", layers)

    def _checked_k(self, name: str, k: object) -> int:
        k = _whole_number(name, k, 1)
        if k < self.forced_blocks:
            raise ValueError(
                f"{name}={k} is less than the {self.forced_blocks} blocks that are always kept "
                f"({self.sink_blocks} sink, {self.local_blocks} local, "
                f"{diagonal_blocks(self.q_block, self.k_block)} on the diagonal): "
                "raise k, or lower sink_blocks, local_blocks or q_block."
            )
        return k

    def with_k(self, k: int | KSchedule) -> StreamConfig:
        """The same choices at another k."""
        return replace(self, k=k)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for files; `from_json` reads it back."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["k"] = self.k if isinstance(self.k, int) else self.k.to_json()
        plain["layers"] = None if self.layers is None else list(self.layers)
        plain["overrides"] = [[layer, head, k] for (layer, head), k in sorted(self.overrides.items())]
        return plain

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> StreamConfig:
        """The config that `to_json` wrote."""
        values = dict(plain)
        values["k"] = values["k"] if isinstance(values["k"], int) else schedule_from_json(values["k"])
        values["layers"] = None if values["layers"] is None else tuple(values["layers"])
        values["overrides"] = {(layer, head): k for layer, head, k in values["overrides"]}
        return StreamConfig(**values)


def diagonal_blocks(q_block: int, k_block: int) -> int:
    """The most key blocks that the rows of one query block stand in; all are kept, so every row sees itself."""
    # A query block starts some multiple of the common divisor into a key block: at worst one such step before its end.
    latest_start = k_block - math.gcd(q_block, k_block)
    return (latest_start + q_block - 1) // k_block + 1


def _whole_number(name: str, value: Any, least: int) -> int:
    """The value as an int, NumPy's too. `ValueError` if it is none, or less than `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{name}={value!r} is not allowed: give a whole number of at least {least}.")
    return operator.index(value)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(choices)}.")

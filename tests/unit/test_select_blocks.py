"""select_blocks against the search written out for one query block at a time, and what must hold for every selector."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import (
    SELECTORS,
    BlockMask,
    FractionOfPrefix,
    MassThreshold,
    StreamConfig,
    block_sparse_attention,
    register_selector,
    select_blocks,
)
from stream_lens.blocks.config import REDUCTIONS, REPRESENTATIVES

pytestmark = pytest.mark.usefixtures("few_branches")


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one layer; `drawn` makes its tensors."""

    batch: int = 1
    kv_heads: int = 1
    groups: int = 1
    q_len: int = 40
    past: int = 0
    beyond: int = 0
    d_head: int = 4
    window: int | None = None
    softcap: float | None = None
    scale: float = 0.7
    padding: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def kv_len(self) -> int:
        return self.past + self.q_len + self.beyond

    def real(self, b: int) -> range:
        left, right = self.padding[b]
        return range(left, self.kv_len - right)

    @property
    def rule(self) -> ScoreRule:
        key = torch.arange(self.kv_len)
        real = [(key >= self.real(b).start) & (key < self.real(b).stop) for b in range(self.batch)]
        padded = any(map(any, self.padding[: self.batch]))
        return ScoreRule(self.scale, self.past, self.window, self.softcap, torch.stack(real) if padded else None)


def drawn(shape: Shape, dtype: torch.dtype = torch.float64, whole: bool = False) -> tuple[Tensor, Tensor]:
    """q and k, normal or small whole numbers."""
    random = torch.Generator().manual_seed(shape.seed)
    sizes = [(shape.batch, shape.heads, shape.q_len, 4), (shape.batch, shape.kv_heads, shape.kv_len, 4)]
    if whole:
        q, k = (torch.randint(-2, 3, size, generator=random) for size in sizes)
    else:
        q, k = (torch.randn(size, generator=random, dtype=torch.float64) for size in sizes)
    return q.to(dtype), k.to(dtype)


shapes = st.builds(
    Shape,
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 2),
    q_len=st.integers(1, 60),
    past=st.integers(0, 40),
    beyond=st.integers(0, 5),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.floats(2.0, 30.0),
    padding=st.tuples(*[st.tuples(st.integers(0, 20), st.integers(0, 20))] * 2),
    seed=st.integers(0, 999),
)

configs = st.builds(
    StreamConfig,
    q_block=st.integers(1, 8),
    k_block=st.integers(2, 6),
    k=st.integers(9, 14),
    representative=st.sampled_from(REPRESENTATIVES),
    reduce=st.sampled_from(REDUCTIONS),
    rank=st.sampled_from(REDUCTIONS),
    oversample=st.integers(1, 3),
    query_stride=st.integers(1, 5),
    sink_blocks=st.integers(0, 2),
    local_blocks=st.integers(0, 2),
)


@st.composite
def tight_configs(draw: st.DrawFn) -> StreamConfig:
    """Configs whose k leaves few free blocks, so that most rows must drop some."""
    config = draw(configs)
    return config.with_k(config.forced_blocks + draw(st.integers(0, 3)))


def seen_blocks(shape: Shape, config: StreamConfig, b: int, i: int) -> set[int]:
    """Key blocks of which some row of query block i sees a key."""
    seen = set()
    for row in range(i * config.q_block, min((i + 1) * config.q_block, shape.q_len)):
        position = shape.past + row
        oldest = 0 if shape.window is None else position - shape.window + 1
        seen |= {key // config.k_block for key in shape.real(b) if oldest <= key <= position}
    return seen


def forced_blocks(shape: Shape, config: StreamConfig, b: int, i: int) -> set[int]:
    """Of those, the diagonal, the local blocks and the sinks."""
    diagonal = (shape.past + i * config.q_block) // config.k_block
    sink = shape.real(b).start // config.k_block
    seen = seen_blocks(shape, config, b, i)
    return {n for n in seen if n >= diagonal - config.local_blocks or sink <= n < sink + config.sink_blocks}


@dataclass
class NaiveSearch:
    """The search of one query block of one head, step by step as the module docstring of `hierarchical` tells it."""

    q: Tensor
    k: Tensor
    shape: Shape
    config: StreamConfig
    b: int
    h: int
    i: int
    rounds: list[dict[tuple[int, int], float]] = field(default_factory=list)

    def keep(self, budget: int) -> set[int]:
        """Every block that is kept, forced ones included."""
        config = self.config
        forced = forced_blocks(self.shape, config, self.b, self.i)
        between = sorted(seen_blocks(self.shape, config, self.b, self.i) - forced)
        free = max(0, budget - len(forced))
        if len(between) <= free:
            return forced | set(between)
        m = min(len(between), config.oversample * free)
        cuts = [len(between) * j // m for j in range(m + 1)] if m else [0]
        branches = [(between[0] + a, between[0] + z) for a, z in pairwise(cuts)]
        while any(stop - start > 1 for start, stop in branches):
            children = [child for branch in branches for child in halves(*branch)]
            scores = self.scores(children, self.row_logit, config.reduce)
            branches = sorted(sorted(children, key=lambda child: (-scores[child], child))[:m])
            self.rounds.append(scores)
        if config.oversample > 1:
            scores = self.scores(branches, self.exact_logit, config.rank)
            branches = sorted(branches, key=lambda child: (-scores[child], child))[:free]
        return forced | {start for start, _ in branches}

    def voters(self) -> list[int]:
        """Every query_stride-th row of the query block that exists and is not padding."""
        rows = range(self.i * self.config.q_block, (self.i + 1) * self.config.q_block, self.config.query_stride)
        return [row for row in rows if row < self.shape.q_len and self.shape.past + row in self.shape.real(self.b)]

    def visible(self, row: int, keys: range | list[int]) -> list[int]:
        position = self.shape.past + row
        oldest = 0 if self.shape.window is None else position - self.shape.window + 1
        return [key for key in keys if oldest <= key <= position and key in self.shape.real(self.b)]

    def keys(self, start: int, stop: int) -> range:
        return range(start * self.config.k_block, min(stop * self.config.k_block, self.shape.kv_len))

    def score(self, row: int, key: Tensor) -> Tensor:
        raw = self.shape.scale * key @ self.q[self.b, self.h, row]
        return raw if self.shape.softcap is None else self.shape.softcap * torch.tanh(raw / self.shape.softcap)

    def key_rows(self, keys: range | list[int]) -> Tensor:
        return self.k[self.b, self.h // self.shape.groups, list(keys)]

    def exact_logit(self, row: int, start: int, stop: int, reduce: str) -> float:
        """Maximum or log of the summed exponentials over all visible keys of a branch."""
        scores = self.score(row, self.key_rows(self.visible(row, self.keys(start, stop))))
        if not len(scores):
            return -math.inf
        return float(scores.amax() if reduce == "max" else scores.logsumexp(0))

    def row_logit(self, row: int, start: int, stop: int, reduce: str) -> float:
        """The same, estimated from the representative of the branch."""
        config, representative = self.config, self.config.representative
        real = [key for key in self.keys(start, stop) if key in self.shape.real(self.b)]
        if representative.startswith("mean"):
            newest = stop * config.k_block - 1
            hidden = self.shape.window is not None and newest <= self.shape.past + row - self.shape.window
            if not real or hidden:
                return -math.inf
            logit = self.score(row, self.key_rows(real).mean(0))
            if representative == "mean_var":
                variance = self.key_rows(real).var(0, correction=0)
                logit = logit + 0.5 * (self.shape.scale * self.q[self.b, self.h, row]).square() @ variance
            return float(logit) if reduce == "max" else float(logit) + math.log(len(real))
        if representative == "strided":
            keys = [start * config.k_block + j * (stop - start) for j in range(config.k_block)]
        else:
            block = {"first": start, "centre": start + (stop - start) // 2, "last": stop - 1}[representative]
            keys = list(self.keys(block, block + 1))
        seen = self.visible(row, keys)
        if not seen:
            return -math.inf
        scores = self.score(row, self.key_rows(seen))
        return float(scores.amax() if reduce == "max" else scores.logsumexp(0) + math.log(len(real) / len(seen)))

    def scores(self, branches: list[tuple[int, int]], logit: Any, reduce: str) -> dict[tuple[int, int], float]:
        """The rows' vote on each branch."""
        votes: dict[tuple[int, int], list[float]] = {branch: [] for branch in branches}
        for row in self.voters():
            logits = [logit(row, *branch, reduce) for branch in branches]
            total = 0.0
            if reduce != "max":
                forced = forced_blocks(self.shape, self.config, self.b, self.i)
                exact = [self.exact_logit(row, block, block + 1, reduce) for block in forced]
                total = float(torch.tensor(logits + exact, dtype=torch.float64).logsumexp(0))
            for branch, value in zip(branches, logits, strict=True):
                votes[branch].append(value if reduce == "max" else math.exp(value - total))
        pool = sum if reduce == "mass" else max
        return {branch: pool(values) for branch, values in votes.items()}


def halves(start: int, stop: int) -> list[tuple[int, int]]:
    middle = (start + stop) // 2
    return [(start, stop)] if stop - start == 1 else [(start, middle), (middle, stop)]


def rows_of(mask: BlockMask) -> dict[tuple[int, int, int], set[int]]:
    """The kept blocks as sets; asserts that each row is ascending, without repeats, empty slots last."""
    found = {}
    for b, h, i in torch.cartesian_prod(*map(torch.arange, mask.indices.shape[:3])).tolist():
        row = mask.indices[b, h, i].tolist()
        blocks = [block for block in row if block >= 0]
        assert row == sorted(set(blocks)) + [-1] * (len(row) - len(blocks))
        found[b, h, i] = set(blocks)
    return found


@settings(max_examples=150)
@given(shapes, tight_configs())
def test_the_search_matches_one_written_out(shape: Shape, config: StreamConfig) -> None:
    q, k = drawn(shape)
    mask = select_blocks(q, k, config, shape.rule)
    for (b, h, i), kept in rows_of(mask).items():
        search = NaiveSearch(q, k, shape, config, b, h, i)
        if search.voters():
            assert kept == search.keep(int(config.k))  # type: ignore[arg-type]


@settings(max_examples=60)
@given(shapes, tight_configs())
def test_the_rounds_are_those_of_the_search(shape: Shape, config: StreamConfig) -> None:
    q, k = drawn(shape)
    mask, rounds = select_blocks(q, k, config, shape.rule, return_rounds=True)
    assert mask.equal(select_blocks(q, k, config, shape.rule))
    for b, h, i in rows_of(mask):
        search = NaiveSearch(q, k, shape, config, b, h, i)
        if not search.voters():
            continue
        search.keep(int(config.k))  # type: ignore[arg-type]
        for one, expected in zip(rounds, search.rounds, strict=False):
            start, stop, score = (x[b, h, i] for x in (one.start, one.stop, one.score))
            found = {(int(a), int(z)): float(s) for a, z, s in zip(start, stop, score, strict=True) if z > a}
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    for earlier, later in pairwise(rounds):
        for b, h, i in rows_of(mask):
            alive = earlier.survives[b, h, i]
            survivors = list(
                zip(earlier.start[b, h, i][alive].tolist(), earlier.stop[b, h, i][alive].tolist(), strict=True)
            )
            used = later.stop[b, h, i] > later.start[b, h, i]
            children = list(zip(later.start[b, h, i][used].tolist(), later.stop[b, h, i][used].tolist(), strict=True))
            assert children == [half for branch in survivors for half in halves(*branch)]
    if rounds and config.oversample == 1:
        last = rounds[-1]
        for (b, h, i), kept in rows_of(mask).items():
            blocks = set(last.start[b, h, i][last.survives[b, h, i]].tolist())
            assert kept == blocks | forced_blocks(shape, config, b, i)


schedules = st.one_of(
    st.integers(9, 14),
    st.builds(FractionOfPrefix, st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.integers(1, 6)),
    st.builds(MassThreshold, st.sampled_from([0.3, 0.9, 1.0]), st.integers(9, 14)),
)


def budget_of(config: StreamConfig, seen: int) -> int:
    if isinstance(config.k, FractionOfPrefix):
        return max(config.k.minimum, math.ceil(config.k.fraction * seen))
    return config.k.maximum if isinstance(config.k, MassThreshold) else config.k


@settings(max_examples=200)
@given(shapes, configs, schedules, st.sampled_from(sorted(SELECTORS)))
def test_what_holds_for_every_selector(shape: Shape, config: StreamConfig, k: Any, selector: str) -> None:
    config = replace(config, k=k, selector=selector)
    q, keys = drawn(shape)
    mask = select_blocks(q, keys, config, shape.rule).check()
    assert mask.shape == (shape.batch, shape.heads, shape.q_len, shape.kv_len)
    assert (mask.q_block, mask.k_block) == (config.q_block, config.k_block)
    assert (mask.offset, mask.window) == (shape.past, shape.window)
    for (b, h, i), kept in rows_of(mask).items():
        seen, forced = seen_blocks(shape, config, b, i), forced_blocks(shape, config, b, i)
        budget = max(budget_of(config, len(seen)), len(forced))
        assert forced <= kept <= seen
        assert len(kept) <= budget
        if NaiveSearch(q, keys, shape, config, b, h, i).voters() and not isinstance(k, MassThreshold):
            assert len(kept) == min(budget, len(seen)), "no slot stays empty while a visible block is dropped"


@settings(max_examples=60)
@given(shapes, configs, st.sampled_from(sorted(SELECTORS)))
def test_a_k_of_all_blocks_keeps_every_visible_one(shape: Shape, config: StreamConfig, selector: str) -> None:
    config = replace(config, k=max(shape.kv_len, config.forced_blocks), selector=selector)
    mask = select_blocks(*drawn(shape), config, shape.rule)
    for (b, _, i), kept in rows_of(mask).items():
        assert kept == seen_blocks(shape, config, b, i)


@settings(max_examples=60)
@given(shapes, tight_configs(), st.sampled_from(["stream", "exhaustive"]), st.data())
def test_a_later_key_changes_no_earlier_row(
    shape: Shape, config: StreamConfig, selector: str, data: st.DataObject
) -> None:
    """Pooled keys must end at the query block: an aligned pyramid would leak keys from after it."""
    config = replace(config, selector=selector)
    q, k = drawn(shape)
    changed = data.draw(st.integers(0, shape.kv_len - 1))
    other_q, other_k = q.clone(), k.clone()
    other_k[:, :, changed:] = 50 * torch.randn_like(k[:, :, changed:])
    if changed >= shape.past:
        other_q[:, :, changed - shape.past :] *= -3
    mask, other = select_blocks(q, k, config, shape.rule), select_blocks(other_q, other_k, config, shape.rule)
    unchanged = max(0, changed - shape.past) // config.q_block
    assert torch.equal(mask.indices[:, :, :unchanged], other.indices[:, :, :unchanged])


@settings(max_examples=60)
@given(shapes, tight_configs(), st.sampled_from([*sorted(set(SELECTORS) - {"random"})]))
def test_heads_and_batch_rows_do_not_meet(shape: Shape, config: StreamConfig, selector: str) -> None:
    config = replace(config, selector=selector)
    q, k = drawn(shape)
    rule = shape.rule
    together = rows_of(select_blocks(q, k, config, rule))
    for b in range(shape.batch):
        for h in range(shape.heads):
            g = h // shape.groups
            alone = replace(rule, key_mask=None if rule.key_mask is None else rule.key_mask[b : b + 1])
            mask = select_blocks(q[b : b + 1, h : h + 1], k[b : b + 1, g : g + 1], config, alone)
            for (_, _, i), kept in rows_of(mask).items():
                assert kept == together[b, h, i]


@settings(max_examples=60)
@given(shapes, tight_configs(), st.sampled_from(["stream", "exhaustive"]), st.data())
def test_a_decode_step_keeps_what_the_whole_text_keeps(
    shape: Shape, config: StreamConfig, selector: str, data: st.DataObject
) -> None:
    """Query blocks cut off the front, with their offset: the rest must not notice, but for rows of padding alone."""
    config = replace(config, selector=selector)
    q, k = drawn(shape)
    whole = select_blocks(q, k, config, shape.rule)
    cut = data.draw(st.integers(0, whole.q_blocks - 1))
    rule = replace(shape.rule, offset=shape.past + cut * config.q_block)
    rest = select_blocks(q[:, :, cut * config.q_block :], k, config, rule)
    kept = rows_of(rest)
    for (b, h, i), blocks in rows_of(whole.select(q_blocks=slice(cut, None))).items():
        if NaiveSearch(q, k, shape, config, b, h, i + cut).voters():
            assert kept[b, h, i] == blocks


@settings(max_examples=60)
@given(shapes, tight_configs(), st.sampled_from(["first", "centre", "last", "strided"]))
def test_ties_go_to_the_lower_block_in_every_precision(shape: Shape, config: StreamConfig, representative: str) -> None:
    """Small whole numbers: scores are exact in every dtype, and many are equal."""
    config = replace(config, representative=representative, reduce="max", rank="max")
    shape = replace(shape, softcap=None, scale=1.0)
    q, k = drawn(shape, whole=True)
    expected = rows_of(select_blocks(q, k, config, shape.rule))
    for (b, h, i), kept in expected.items():
        search = NaiveSearch(q, k, shape, config, b, h, i)
        if search.voters():
            assert kept == search.keep(int(config.k))  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert rows_of(select_blocks(*drawn(shape, dtype, whole=True), config, shape.rule)) == expected


@settings(max_examples=80)
@given(shapes, tight_configs(), st.sampled_from(["stream", "exhaustive"]))
@example(
    Shape(q_len=60, padding=((3, 0), (0, 0))),
    StreamConfig(4, 6, 3, representative="mean", sink_blocks=0, oversample=1),
    "stream",
)
def test_what_padding_holds_changes_nothing(shape: Shape, config: StreamConfig, selector: str) -> None:
    """Pooled keys least of all: the first real block may be padding in part."""
    config = replace(config, selector=selector)
    q, k = drawn(shape)
    padding = torch.ones(k.shape[0], 1, k.shape[2], 1, dtype=torch.bool)
    for b in range(shape.batch):
        padding[b, :, shape.real(b).start : shape.real(b).stop] = False
    other = torch.where(padding, 40 * torch.ones_like(k), k)
    mask, found = (rows_of(select_blocks(q, keys, config, shape.rule)) for keys in (k, other))
    assert mask == found


def test_equal_keys_leave_the_lowest_blocks() -> None:
    q, k = torch.ones(1, 1, 64, 4), torch.ones(1, 1, 64, 4)
    for representative in REPRESENTATIVES:
        for reduce in REDUCTIONS:
            config = StreamConfig(4, 4, 5, representative=representative, reduce=reduce, rank=reduce, oversample=2)
            mask = select_blocks(q, k, config)
            assert mask.indices[0, 0, -1].tolist()[:2] == [0, 1]
            assert mask.indices[0, 0, -1, -1] == 15


@settings(max_examples=40)
@given(shapes, configs, st.integers(0, 3), st.integers(0, 3), st.sampled_from(sorted(SELECTORS)))
def test_overrides_change_their_layer_and_head_alone(
    shape: Shape, config: StreamConfig, layer: int, head: int, selector: str
) -> None:
    config = replace(config, selector=selector)
    head = head % shape.heads
    q, k = drawn(shape)
    plain = rows_of(select_blocks(q, k, config, shape.rule, layer=layer))
    more = replace(config, overrides={(layer, head): 99})
    found = rows_of(select_blocks(q, k, more, shape.rule, layer=layer))
    for (b, h, i), kept in found.items():
        if h != head:
            assert kept == plain[b, h, i]
        elif NaiveSearch(q, k, shape, config, b, h, i).voters():
            assert kept == seen_blocks(shape, config, b, i)
    if selector != "random":  # whose draws depend on the width of the mask
        assert rows_of(select_blocks(q, k, more, shape.rule, layer=layer + 1)) == plain
        assert rows_of(select_blocks(q, k, more, shape.rule)) == plain


@settings(max_examples=60)
@given(shapes, configs, st.sampled_from([0.2, 0.5, 0.9, 0.99, 1.0]), st.sampled_from(["stream", "exhaustive"]))
def test_a_mass_threshold_keeps_the_fewest_blocks_that_hold_it(
    shape: Shape, config: StreamConfig, share: float, selector: str
) -> None:
    config = replace(config, selector=selector)
    q, k = (x.requires_grad_() for x in drawn(shape))
    whole = select_blocks(q, k, config, shape.rule)
    trimmed = select_blocks(q, k, config.with_k(MassThreshold(share, int(config.k))), shape.rule)  # type: ignore[arg-type]
    mass = block_sparse_attention(q, k, torch.zeros_like(k), whole, shape.rule, kernel="torch").block_mass
    for (b, h, i), kept in rows_of(trimmed).items():
        masses = dict(zip(whole.indices[b, h, i].tolist(), mass[b, h, i].tolist(), strict=True))
        masses.pop(-1, None)
        forced = forced_blocks(shape, config, b, i)
        assert forced <= kept <= set(masses)
        total = sum(masses.values())
        chosen = kept - forced
        assert sum(masses[n] for n in kept) >= share * total - 1e-9 or kept == set(masses)
        if chosen:
            worst = min(chosen, key=lambda n: masses[n])
            assert sum(masses[n] for n in kept - {worst}) < share * total + 1e-9, "one block fewer would do"
            left_out = [masses[n] for n in set(masses) - kept]
            assert max(left_out, default=0.0) <= masses[worst] + 1e-12, "the best come first"


def test_a_fraction_of_the_prefix_grows_along_the_text() -> None:
    q, k = drawn(Shape(q_len=64))
    config = StreamConfig(4, 4, FractionOfPrefix(0.5, minimum=3))
    counts = select_blocks(q, k, config).kept.sum(-1)[0, 0].tolist()
    assert counts == [min(n, max(3, math.ceil(n / 2))) for n in range(1, 17)]


def test_without_a_rule_the_queries_are_the_last_positions() -> None:
    q, k = drawn(Shape(q_len=9, past=20))
    config = StreamConfig(4, 4, 3)
    mask = select_blocks(q, k, config)
    assert mask.offset == 20
    assert mask.equal(select_blocks(q, k, config, ScoreRule(0.5, offset=20)))


def test_the_mask_needs_no_gradient_and_leaves_inputs_alone() -> None:
    q, k = (x.requires_grad_() for x in drawn(Shape()))
    copies = [x.detach().clone() for x in (q, k)]
    mask = select_blocks(q, k, StreamConfig(4, 4, 4))
    assert not mask.indices.requires_grad
    assert torch.equal(q, copies[0])
    assert torch.equal(k, copies[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": StreamConfig(selector="best")}, "selector='best' is not known: choose one of stream, exhaustive"),
        (
            {"config": StreamConfig(overrides={(3, 7): 4})},
            r"overrides\[\(3, 7\)\] names a head that layer 3 lacks: it has 1",
        ),
        ({"config": StreamConfig(selector="random"), "return_rounds": True}, "selector 'random' has no rounds: use"),
        ({"q": torch.zeros(1, 8, 4)}, "q and k must be"),
        ({"q": torch.zeros(1, 1, 0, 4)}, r"q \(1, 1, 0, 4\) and k \(1, 1, 8, 4\) must not be empty"),
        ({"q": torch.zeros(1, 1, 8, 4, dtype=torch.float64)}, "q and k must share one dtype"),
        ({"q": torch.zeros(1, 1, 9, 4)}, "offset=-1 is not allowed"),
        ({"rule": ScoreRule(1.0, offset=1)}, "queries at positions 1 to 8 need as many keys; got 8"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(change: dict, message: str) -> None:
    good: dict[str, Any] = {
        "q": torch.zeros(1, 1, 8, 4),
        "k": torch.zeros(1, 1, 8, 4),
        "config": StreamConfig(),
        "layer": 3,
    }
    select_blocks(**good)
    with pytest.raises(ValueError, match=message):
        select_blocks(**{**good, **change})


def test_a_selector_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SELECTORS, "oldest", raising=False)

    @register_selector("oldest")
    def oldest(search: Any) -> Tensor:
        block = search.ranges.sink_stop[:, None, :, None] + torch.arange(search.slots)
        end = torch.minimum(search.ranges.local_start[:, None], search.ranges.sink_stop[:, None] + search.free)
        return torch.where(block < end[..., None], block, -1).expand(-1, search.q.shape[1], -1, -1)

    try:
        mask = select_blocks(*drawn(Shape(q_len=64)), StreamConfig(4, 4, 5, selector="oldest"))
        assert mask.indices[0, 0, -1].tolist() == [0, 1, 2, 3, 15]
        with pytest.raises(ValueError, match="a selector named 'oldest' exists already: choose another name"):
            register_selector("oldest")(oldest)
    finally:
        del SELECTORS["oldest"]


def test_the_causality_test_would_notice_a_leak() -> None:
    """A selector that ranks blocks by the mean of all keys after them, the future included."""

    def leaky(search: Any) -> Tensor:
        n = -(-search.k.shape[2] // search.config.k_block)
        future = int(search.k.sum() > 0)
        block = search.ranges.sink_stop[:, None, :, None] + torch.arange(search.slots) + future
        keep = (block < search.ranges.local_start[:, None, :, None]) & (
            torch.arange(search.slots) < search.free[..., None]
        )
        return torch.where(keep, block.clamp(max=n), -1).expand(-1, search.q.shape[1], -1, -1)

    SELECTORS["leaky"] = leaky
    try:
        q, k = drawn(Shape(q_len=64))
        config = StreamConfig(4, 4, 4, selector="leaky")
        k[:, :, -1] = 1000.0
        mask = select_blocks(q, k, config)
        k[:, :, -1] = -1000.0
        assert not torch.equal(mask.indices[:, :, :8], select_blocks(q, k, config).indices[:, :, :8])
    finally:
        del SELECTORS["leaky"]


def test_the_written_out_search_can_tell_a_wrong_one() -> None:
    shape = Shape(q_len=60)
    q, k = drawn(shape)
    config = StreamConfig(4, 4, 5, oversample=1)
    kept = rows_of(select_blocks(q, k, replace(config, representative="first"), shape.rule))
    assert kept != {row: NaiveSearch(q, k, shape, config, *row).keep(5) for row in kept}

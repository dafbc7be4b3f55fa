"""The Triton search against its reference and against the torch search: equal block indices, ties included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_kernels.select_blocks import select
from stream_kernels.select_blocks.configs import unsupported
from stream_kernels.select_blocks.reference import select_blocks_reference
from stream_kernels.select_blocks.select import select_blocks_triton
from stream_lens.blocks import FractionOfPrefix, StreamConfig
from stream_lens.blocks.selection import prepared, select_blocks
from tests.ops.test_block_attention_triton import moved

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_poisoned_memory", "few_branches")]


def config_of(**choices: Any) -> StreamConfig:
    small = {
        "q_block": 8,
        "k_block": 8,
        "k": 4,
        "oversample": 2,
        "query_stride": 2,
        "representative": "mean",
        "rank": "max",
    }
    return StreamConfig(**small | choices)


def random_rows(batch: int, heads: int, length: int, d_head: int, seed: int, dtype: torch.dtype) -> Tensor:
    """In [batch, row, head, d] memory between NaN: a kernel that reads past an edge shows it."""
    memory = torch.full((batch, length + 2, heads, d_head + 8), torch.nan, dtype=dtype)
    values = torch.randn(batch, length, heads, d_head, generator=torch.Generator().manual_seed(seed))
    memory[:, 1:-1, :, :d_head] = values.to(dtype)
    return memory[:, 1:-1, :, :d_head].transpose(1, 2)


def problem(
    config: StreamConfig,
    *,
    batch: int = 1,
    kv_heads: int = 1,
    groups: int = 1,
    query_len: int = 36,
    past: int = 64,
    d_head: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    padding: str = "",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, ScoreRule]:
    key_len = past + query_len
    q = random_rows(batch, kv_heads * groups, query_len, d_head, seed, dtype)
    k = random_rows(batch, kv_heads, key_len, d_head, seed + 1, dtype)
    key_mask = None
    if padding:
        key_mask = torch.rand(batch, key_len, generator=torch.Generator().manual_seed(seed)) > 0.3
        key_mask[:, -1] = True
    if padding == "left":
        key_mask = torch.arange(key_len) >= torch.tensor([0, 45])[:batch, None]
    return q, k, ScoreRule(d_head**-0.5, offset=past, window=window, softcap=softcap, key_mask=key_mask)


def run(q: Tensor, k: Tensor, rule: ScoreRule, config: StreamConfig, device: torch.device) -> Tensor:
    search = prepared(q, k, rule, config, None)
    return select_blocks_triton(*(moved(x, device) for x in (q, k, rule)), **arguments(search, device)).cpu()


def arguments(search: Any, device: torch.device) -> dict[str, Any]:
    ranges = {
        name: moved(getattr(search.ranges, name), device) for name in ("first", "sink_stop", "local_start", "stop")
    }
    names = ("q_block", "k_block", "representative", "reduce", "rank", "oversample", "query_stride")
    choices = {name: getattr(search.config, name) for name in names}
    return ranges | choices | {"free": moved(search.free, device), "slots": search.slots, "rounds": search.rounds}


def check(q: Tensor, k: Tensor, rule: ScoreRule, config: StreamConfig, device: torch.device) -> Tensor:
    ours = run(q, k, rule, config, device)
    assert ours.dtype == torch.int32
    theirs = select_blocks(q, k, config, rule, kernel="torch").indices
    torch.testing.assert_close(ours, theirs.to(torch.int32), rtol=0, atol=0)
    reference = select_blocks_reference(
        q, k, rule, **arguments(prepared(q, k, rule, config, None), torch.device("cpu"))
    )
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)
    return ours


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": (
        {"q_block": 32, "k_block": 8, "k": 8, "oversample": 4, "query_stride": 4},
        {"query_len": 40, "past": 390},
    ),
    "paper": ({"representative": "first", "reduce": "max", "oversample": 1, "query_stride": 1}, {}),
    "mean_max": ({"reduce": "max"}, {}),
    "mean_peak": ({"reduce": "peak", "rank": "peak"}, {}),
    "rank_by_mass": ({"rank": "mass"}, {}),
    "first_by_mass": ({"representative": "first"}, {}),
    "variance": ({"representative": "mean_var"}, {"padding": "holes", "window": 60}),
    "variance_max": ({"representative": "mean_var", "reduce": "max"}, {"softcap": 1.0}),
    "centre": ({"representative": "centre", "rank": "mass"}, {}),
    "last": ({"representative": "last", "reduce": "max"}, {}),
    "strided": ({"representative": "strided"}, {}),
    "heads_share_keys": ({}, {"batch": 2, "kv_heads": 2, "groups": 2, "query_len": 12, "past": 69}),
    "window": ({}, {"window": 50}),
    "window_centre": ({"representative": "centre"}, {"window": 50}),
    "softcap": ({}, {"softcap": 0.5}),
    "left_padding": ({}, {"batch": 2, "padding": "left", "query_len": 40, "past": 50}),
    "holes": ({}, {"batch": 2, "padding": "holes", "query_len": 30}),
    "holes_first_block": ({"representative": "first"}, {"padding": "holes"}),
    "all_at_once": ({"rank": "mass"}, {"window": 60, "softcap": 1.0, "padding": "holes", "groups": 2, "query_len": 30}),
    "q_block_of_two_k_blocks": ({"q_block": 16, "k": 5}, {"query_len": 50, "past": 61}),
    "k_block_of_two_q_blocks": ({"k_block": 16}, {"past": 150, "query_len": 30}),
    "blocks_of_no_power_of_two": ({"q_block": 10, "k_block": 6, "k": 6}, {}),
    "local_blocks": ({"k": 6, "local_blocks": 2, "sink_blocks": 2}, {}),
    "nothing_forced_but_diagonal": ({"sink_blocks": 0}, {}),
    "one_free_block": ({"k": 3}, {}),
    "no_free_block": ({"k": 2}, {}),
    "decode": ({}, {"query_len": 1, "past": 150}),
    "rows_with_their_own_budget": ({"k": FractionOfPrefix(0.4, minimum=3)}, {}),
    "short": ({}, {"query_len": 5, "past": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_same_blocks(name: str, triton_device: torch.device) -> None:
    choices, sizes = CASES[name]
    config = config_of(**choices)
    check(*problem(config, **sizes), config, triton_device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("representative", ["mean", "centre"])
def test_half_precision(representative: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    config = config_of(representative=representative)
    check(*problem(config, dtype=dtype, query_len=24, past=70), config, triton_device)


@pytest.mark.parametrize("d_head", [64, 80, 256])
def test_head_dims_in_use(d_head: int, triton_device: torch.device) -> None:
    config = config_of()
    check(*problem(config, d_head=d_head, query_len=24, past=70), config, triton_device)


@pytest.mark.parametrize("reduce", ["max", "mass"])
@pytest.mark.parametrize("representative", ["mean", "first"])
def test_ties_go_to_the_lower_block(representative: str, reduce: str, triton_device: torch.device) -> None:
    """One coordinate of -1, 0 or 1 and no rounding: many branches score exactly the same."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.zeros(1, 1, 40, 16), torch.zeros(1, 1, 128, 16)
    q[..., 0] = torch.randint(0, 2, (1, 1, 40), generator=random) * 2.0 - 1
    k[..., 0] = torch.randint(-1, 2, (1, 1, 16), generator=random).repeat_interleave(8, -1)
    config = config_of(representative=representative, reduce=reduce)
    check(q, k, ScoreRule(0.25, offset=88), config, triton_device)
    same = check(q, torch.zeros_like(k), ScoreRule(0.25, offset=88), config, triton_device)
    assert same[0, 0, 0].tolist() == [0, 1, 2, 11]  # the sink, the lowest two blocks and the diagonal


def test_every_block_when_k_allows(triton_device: torch.device) -> None:
    config = config_of(k=20)
    kept = check(*problem(config, query_len=24, past=70), config, triton_device)
    assert [len(row[row >= 0]) for row in kept[0, 0]] == [10, 11, 12]


def test_few_programs_search_for_many_blocks(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(select, "MIN_PROGRAMS", 2)
    config = config_of(rank="mass")
    check(*problem(config, groups=2, query_len=30), config, triton_device)


def test_select_blocks_runs_it_when_asked(triton_device: torch.device) -> None:
    config = config_of()
    q, k, rule = problem(config, query_len=12)
    ours = select_blocks(q.to(triton_device), k.to(triton_device), config, rule, kernel="triton")
    assert torch.equal(ours.indices.cpu(), select_blocks(q, k, config, rule, kernel="torch").indices)


FITS = {"d_head": 64, "slots": 16} | {
    name: getattr(config_of(q_block=32, k_block=32, k=16, oversample=4, query_stride=4, rank="max"), name)
    for name in ("q_block", "k_block", "representative", "reduce", "rank", "oversample", "query_stride")
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"representative": "median"}, "median"),
        ({"reduce": "median"}, "reduce"),
        ({"rank": "median"}, "rank"),
        ({"d_head": 512}, "head dimensions up to 256, not 512"),
        ({"k_block": 256}, "k_block up to 128, not 256"),
        ({"q_block": 128, "query_stride": 1}, "rows"),
        ({"slots": 300}, "branches"),
    ],
)
def test_what_it_cannot_run_has_a_reason(change: dict[str, Any], message: str) -> None:
    assert unsupported(**FITS) is None
    reason = unsupported(**(FITS | change))
    assert reason is not None
    assert message in reason


def test_wrong_arguments_raise(triton_device: torch.device) -> None:
    config = config_of()
    q, k, rule = problem(config)
    right = arguments(prepared(q, k, rule, config, None), torch.device("cpu"))
    for change, message in (
        ({"free": right["free"][:, :, 1:]}, "free"),
        ({"first": right["first"][:, 1:]}, "stack"),
        ({"representative": "median"}, "median"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            select_blocks_triton(q, k, rule, **(right | change))
    with pytest.raises(ValueError, match="dtype"):
        select_blocks_triton(q, k.half(), rule, **right)

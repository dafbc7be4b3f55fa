"""The C++ search against the torch search: the same blocks, whatever the options.

Random inputs have no two scores that differ by rounding only; whole numbers have exact ties in plenty.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_kernels.cpu import cpu_available, cpu_select_blocks
from stream_kernels.rule import ScoreRule
from stream_lens.blocks import BlockMask, FractionOfPrefix, MassThreshold, StreamConfig, select_blocks
from stream_lens.blocks.config import REDUCTIONS, REPRESENTATIVES
from stream_lens.blocks.kernel_choice import choose_search
from stream_lens.blocks.selection import prepared

pytestmark = pytest.mark.usefixtures("few_branches")
needs_operator = pytest.mark.skipif(not cpu_available()[0], reason=cpu_available()[1])


def random_rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole_rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-1, 0 and 1: with a scale that is a power of two, every score is exact."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(q: Tensor, k: Tensor, config: StreamConfig, rule: ScoreRule, layer: int | None = None) -> list[BlockMask]:
    return [select_blocks(q, k, config, rule, layer=layer, kernel=kernel) for kernel in ("cpp", "torch")]  # type: ignore[arg-type]


def key_mask(padding: str, batch: int, length: int, seed: int) -> Tensor | None:
    if padding == "none":
        return None
    if padding == "holes":
        return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    real = torch.ones(batch, length, dtype=torch.bool)
    side = slice(0, length // 3) if padding == "left" else slice(length - length // 3, length)
    real[0, side] = False
    return real


@needs_operator
@settings(max_examples=150)
@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "kv_heads": st.integers(1, 2),
            "groups": st.integers(1, 3),
            "length": st.integers(1, 300),
            "past": st.sampled_from([0, 0, 5, 64]),
            "d_head": st.sampled_from([3, 16, 20, 64]),
        }
    ),
    options=st.fixed_dictionaries(
        {
            "q_block": st.integers(1, 20),
            "k_block": st.integers(1, 20),
            "representative": st.sampled_from(REPRESENTATIVES),
            "reduce": st.sampled_from(REDUCTIONS),
            "rank": st.sampled_from(REDUCTIONS),
            "oversample": st.sampled_from([1, 2, 4]),
            "query_stride": st.integers(1, 5),
            "sink_blocks": st.integers(0, 2),
            "local_blocks": st.integers(0, 2),
        }
    ),
    free=st.integers(0, 9),
    fraction=st.booleans(),
    window=st.sampled_from([None, None, 1, 30, 100]),
    softcap=st.sampled_from([None, 5.0]),
    padding=st.sampled_from(["none", "none", "left", "right", "holes"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_the_same_blocks_as_the_torch_search(
    sizes: dict[str, int],
    options: dict[str, Any],
    free: int,
    fraction: bool,
    window: int | None,
    softcap: float | None,
    padding: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    batch, kv_heads, d_head = sizes["batch"], sizes["kv_heads"], sizes["d_head"]
    key_len = sizes["past"] + sizes["length"]
    q = random_rows(batch, kv_heads * sizes["groups"], sizes["length"], d_head, seed=seed, dtype=dtype)
    k = random_rows(batch, kv_heads, key_len, d_head, seed=seed + 1, dtype=dtype)
    forced = StreamConfig(k=1000, **options).forced_blocks
    config = StreamConfig(k=FractionOfPrefix(0.3, forced + free) if fraction else forced + free, **options)
    rule = ScoreRule(d_head**-0.5, sizes["past"], window, softcap, key_mask(padding, batch, key_len, seed))
    cpp, plain = both(q, k, config, rule)
    assert torch.equal(cpp.indices, plain.indices)


@needs_operator
@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("rank", ["max", "mass"])
@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_exact_ties_go_to_the_lower_block(representative: str, rank: str, padding: str) -> None:
    q, k = whole_rows(1, 4, 400, 4, seed=0), whole_rows(1, 2, 400, 4, seed=1)
    rule = ScoreRule(0.5, key_mask=key_mask(padding, 1, 400, 2))
    config = StreamConfig(
        q_block=8, k_block=8, k=6, representative=representative, reduce="max", rank="max", query_stride=2
    )
    cpp, plain = both(q, k, config, rule)
    assert torch.equal(cpp.indices, plain.indices)
    # The softmax of the same scores: equal logits stay equal.
    constant = k[:, :, :8].repeat(1, 1, 50, 1)
    config = StreamConfig(q_block=8, k_block=8, k=6, representative=representative, reduce="mass", rank=rank)
    cpp, plain = both(q, constant, config, ScoreRule(0.5))
    assert torch.equal(cpp.indices, plain.indices)


@needs_operator
def test_equal_keys_keep_the_lowest_blocks() -> None:
    q, k = torch.ones(1, 1, 160, 4), torch.ones(1, 1, 160, 4)
    mask = select_blocks(q, k, StreamConfig(q_block=8, k_block=8, k=5, oversample=1, reduce="max"), kernel="cpp")
    assert mask.indices[0, 0, -1].tolist() == [0, 1, 2, 3, 19]


@needs_operator
def test_overrides_and_mass_thresholds() -> None:
    q, k = random_rows(1, 4, 300, 16, seed=0), random_rows(1, 2, 300, 16, seed=1)
    for config in (
        StreamConfig(q_block=8, k_block=8, k=5, overrides={(3, 0): 12, (3, 2): 3, (4, 1): 7}),
        StreamConfig(q_block=8, k_block=8, k=MassThreshold(0.8, maximum=10)),
    ):
        cpp, plain = both(q, k, config, ScoreRule(0.25), layer=3)
        assert torch.equal(cpp.indices, plain.indices)
    kept = select_blocks(q, k, config.with_k(5), kernel="cpp").kept.sum(-1)
    assert int(kept.max()) == 5


@needs_operator
def test_a_budget_of_all_blocks_keeps_all_of_them() -> None:
    q, k = random_rows(1, 2, 130, 8, seed=0), random_rows(1, 1, 130, 8, seed=1)
    for options in ({}, {"oversample": 1}, {"representative": "centre", "reduce": "max"}):
        mask = select_blocks(q, k, StreamConfig(q_block=8, k_block=8, k=17, **options), kernel="cpp")
        assert mask.sparsity() == 0


@needs_operator
def test_means_stay_exact_far_into_a_text() -> None:
    """Prefix sums of a drifting mean: in float32 the last branches would be noise."""
    length = 1 << 15
    drift = torch.full((1, 1, length, 4), 1000.0)
    k = drift + random_rows(1, 1, length, 4, seed=1) / 8
    q = random_rows(1, 1, length, 4, seed=0)
    config = StreamConfig(q_block=64, k_block=64, k=8, representative="mean", reduce="max", rank="max")
    rows = slice(length - 256, length)
    rule = ScoreRule(0.5, offset=length - 256)
    cpp = select_blocks(q[:, :, rows], k, config, rule, kernel="cpp")
    plain = select_blocks(q[:, :, rows].double(), k.double(), config, rule)
    same = (cpp.indices == plain.indices).double().mean()
    assert same > 0.8  # float32 scores near 1000 still tie by rounding


@needs_operator
@pytest.mark.parametrize("threads", [2, 5])
def test_the_thread_count_changes_nothing(threads: int) -> None:
    q, k = random_rows(2, 4, 300, 16, seed=0), random_rows(2, 2, 300, 16, seed=1)
    config, before = StreamConfig(q_block=8, k_block=8, k=5), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        many = select_blocks(q, k, config, kernel="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(many.indices, select_blocks(q, k, config, kernel="cpp").indices)


@needs_operator
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, from switching oneDNN off and on
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_brgemm_the_plain_loop_serves(dtype: torch.dtype) -> None:
    q, k = random_rows(1, 4, 300, 20, seed=0, dtype=dtype), random_rows(1, 2, 300, 20, seed=1, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        cpp, plain = both(q, k, StreamConfig(q_block=8, k_block=8, k=5), ScoreRule(0.25))
    assert torch.equal(cpp.indices, plain.indices)


@needs_operator
def test_keys_in_any_memory_layout() -> None:
    """[batch, row, head, d] memory between NaN, as attention modules hold it."""

    def laid_out(x: Tensor) -> Tensor:
        batch, heads, length, d_head = x.shape
        memory = torch.full((batch, length + 2, heads, d_head + 8), torch.nan)
        memory[:, 1:-1, :, :d_head] = x.transpose(1, 2)
        return memory[:, 1:-1, :, :d_head].transpose(1, 2)

    q, k = random_rows(2, 4, 200, 16, seed=0), random_rows(2, 2, 200, 16, seed=1)
    for representative, reduce in itertools.product(("mean", "strided"), ("mass", "max")):
        config = StreamConfig(q_block=8, k_block=8, k=5, representative=representative, reduce=reduce)
        expected = select_blocks(q, k, config, kernel="cpp")
        assert torch.equal(select_blocks(laid_out(q), laid_out(k), config, kernel="cpp").indices, expected.indices)


@needs_operator
@pytest.mark.parametrize("rank", ["mass", "max", "peak"])
@pytest.mark.parametrize("k", [4, FractionOfPrefix(0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_oracle_is_the_same_in_the_operator(dtype: torch.dtype, k: int | FractionOfPrefix, rank: str) -> None:
    q, keys = random_rows(2, 4, 211, 16, seed=0).to(dtype), random_rows(2, 2, 230, 16, seed=1).to(dtype)
    config = StreamConfig(q_block=8, k_block=16, k=k, selector="exhaustive", rank=rank)  # type: ignore[arg-type]
    for rule in (None, ScoreRule(0.3, offset=19, window=70, softcap=5.0)):
        expected = select_blocks(q, keys, config, rule, kernel="torch")
        assert torch.equal(select_blocks(q, keys, config, rule, kernel="cpp").indices, expected.indices)


@needs_operator
def test_scores_that_are_not_numbers_do_no_harm() -> None:
    q, k = random_rows(1, 2, 200, 16, seed=0), random_rows(1, 1, 200, 16, seed=1)
    k[0, 0, 50] = torch.nan
    k[0, 0, 90] = torch.inf
    mask = select_blocks(q, k, StreamConfig(q_block=8, k_block=8, k=5), kernel="cpp")
    assert int(mask.indices.max()) < 25


def test_what_only_torch_can_search_says_so() -> None:
    q, k = random_rows(1, 1, 64, 8, seed=0), random_rows(1, 1, 64, 8, seed=1)
    config = StreamConfig(q_block=8, k_block=8, k=4, selector="random")
    rule = ScoreRule(1.0)
    assert choose_search("auto", prepared(q, k, rule, config, None)) == "torch"
    with pytest.raises(RuntimeError, match="kernel='cpp' cannot run here: selector 'random'"):
        select_blocks(q, k, config, kernel="cpp")
    with pytest.raises(RuntimeError, match=r"float32 and bfloat16, not torch\.float64"):
        select_blocks(q.double(), k.double(), StreamConfig(k=4), kernel="cpp")
    with pytest.raises(ValueError, match="kernel='gpu' is not known"):
        select_blocks(q, k, config, kernel="gpu")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="no rounds to return"):
        select_blocks(q, k, StreamConfig(k=4), return_rounds=True, kernel="cpp")


@needs_operator
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 2, 64, 8).half(), "k": torch.zeros(1, 1, 64, 8).half()}, TypeError, "float16"),
        ({"k": torch.zeros(1, 1, 64, 4)}, ValueError, "do not fit"),
        ({"free": torch.zeros(1, 2, 7, dtype=torch.long)}, ValueError, "free has shape"),
        ({"representative": "median"}, ValueError, "'median' is not one of first"),
        ({"rank": "sum"}, ValueError, "rank 'sum'"),
        ({"q": torch.zeros(1, 2, 64, 8, device="meta")}, ValueError, "meta"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cpu_select_blocks(**operator_call(**change))


def operator_call(**change: Any) -> dict[str, Any]:
    """Arguments of the operator itself, for two heads of 64 rows."""
    q, k = random_rows(1, 2, 64, 8, seed=0), random_rows(1, 1, 64, 8, seed=1)
    config, rule = StreamConfig(q_block=8, k_block=8, k=4), ScoreRule(0.25)
    search = prepared(q, k, rule, config, None)
    names = ("q_block", "k_block", "representative", "reduce", "rank", "oversample", "query_stride")
    ranges = {name: getattr(search.ranges, name) for name in ("first", "sink_stop", "local_start", "stop")}
    sizes = {"free": search.free, "slots": search.slots, "rounds": search.rounds}
    return {"q": q, "k": k, "rule": rule, **ranges, **sizes, **{name: getattr(config, name) for name in names}} | change


@needs_operator
def test_schema_and_fake_kernel_tell_the_truth() -> None:
    call = operator_call()
    rule = call.pop("rule")
    ranges = torch.stack([call.pop(name) for name in ("first", "sink_stop", "local_start", "stop")])
    names = ("representative", "reduce", "rank", "oversample", "query_stride", "slots", "rounds")
    operands = (call["q"], call["k"], ranges, call["free"], 8, 8, rule.scale, 0, None, None, None)
    torch.library.opcheck(
        torch.ops.stream_lens_cpu.select_blocks.default,
        (*operands, *[call[name] for name in names]),
        test_utils=("test_schema", "test_faketensor"),
    )

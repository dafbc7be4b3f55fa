"""StreamConfig: what it accepts, what it says when it does not, and its way through a file."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_lens.blocks import FractionOfPrefix, MassThreshold, StreamConfig
from stream_lens.blocks.config import REDUCTIONS, REPRESENTATIVES, diagonal_blocks


def test_the_defaults_are_valid() -> None:
    config = StreamConfig()
    assert config.forced_blocks == 2  # one sink, one diagonal block
    assert config.with_k(5) == StreamConfig(k=5)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"q_block": 0}, "q_block=0 is not allowed: give a whole number of at least 1"),
        ({"k_block": -3}, "k_block=-3 is not allowed"),
        ({"k_block": 1.5}, "k_block=1.5 is not allowed"),
        ({"oversample": 0}, "oversample=0 is not allowed"),
        ({"query_stride": True}, "query_stride=True is not allowed"),
        ({"sink_blocks": -1}, "sink_blocks=-1 is not allowed: give a whole number of at least 0"),
        ({"local_blocks": None}, "local_blocks=None is not allowed"),
        ({"seed": 0.5}, "seed=0.5 is not allowed"),
        ({"k": 0}, "k=0 is not allowed"),
        ({"k": "16"}, "k='16' is not allowed"),
        ({"k": 1}, "k=1 is less than the 2 blocks that are always kept .1 sink, 0 local, 1 on the diagonal"),
        ({"k": 3, "local_blocks": 2}, "k=3 is less than the 4 blocks"),
        ({"k": MassThreshold(0.9, maximum=1)}, "k.maximum=1 is less than the 2 blocks"),
        ({"representative": "median"}, "representative='median' is not known: choose one of first, centre"),
        ({"reduce": "sum"}, "reduce='sum' is not known: choose one of max, mass, peak"),
        ({"rank": "sum"}, "rank='sum' is not known"),
        ({"overrides": {(0, 1): 1}}, r"overrides\[\(0, 1\)\]=1 is less than the 2 blocks"),
        ({"overrides": {3: 8}}, r"overrides has the key 3: give \(layer, head\) pairs"),
        ({"overrides": {(0, -1): 8}}, r"the head of overrides\[\(0, -1\)\]=-1 is not allowed"),
        ({"overrides": {("0", 1): 8}}, r"the layer of overrides\[\('0', 1\)\]='0' is not allowed"),
        ({"overrides": None}, r"overrides=None is not allowed: give a dict"),
        ({"layers": 3}, "layers=3 is not allowed: give several"),
        ({"layers": [0, -1]}, "a layer of layers=-1 is not allowed"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_sentence(given_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**given_)


def test_numbers_of_numpy_are_whole_numbers() -> None:
    config = StreamConfig(k=np.int64(8), layers=np.arange(2), overrides={(np.int32(0), 1): np.int64(9)})  # type: ignore[arg-type, dict-item]
    assert config == StreamConfig(k=8, layers=(0, 1), overrides={(0, 1): 9})
    assert json.dumps(config.to_json())


def test_it_does_not_change_with_what_it_was_made_from() -> None:
    overrides, layers = {(0, 1): 8}, [0, 2]
    config = StreamConfig(overrides=overrides, layers=layers)  # type: ignore[arg-type]
    overrides[(0, 2)] = 9
    layers.append(5)
    assert config.overrides == {(0, 1): 8}
    assert config.layers == (0, 2)


configs = st.builds(
    StreamConfig,
    q_block=st.integers(1, 8),
    k_block=st.integers(4, 8),
    k=st.integers(8, 40)
    | st.builds(FractionOfPrefix, st.floats(0.01, 1.0), st.integers(1, 9))
    | st.builds(MassThreshold, st.floats(0.01, 1.0), st.integers(8, 99)),
    selector=st.sampled_from(["stream", "exhaustive", "random"]),
    representative=st.sampled_from(REPRESENTATIVES),
    reduce=st.sampled_from(REDUCTIONS),
    rank=st.sampled_from(REDUCTIONS),
    oversample=st.integers(1, 5),
    query_stride=st.integers(1, 5),
    sink_blocks=st.integers(0, 2),
    local_blocks=st.integers(0, 2),
    layers=st.none() | st.lists(st.integers(0, 30)).map(tuple),
    overrides=st.dictionaries(st.tuples(st.integers(0, 30), st.integers(0, 30)), st.integers(8, 40), max_size=3),
    seed=st.integers(0, 9),
)


@given(configs)
def test_it_survives_a_file_and_a_process(config: StreamConfig) -> None:
    assert StreamConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert pickle.loads(pickle.dumps(config)) == config


@given(st.integers(1, 24), st.integers(1, 24))
def test_diagonal_blocks_is_the_most_that_any_query_block_stands_in(q_block: int, k_block: int) -> None:
    stood_in = [
        len({row // k_block for row in range(start, start + q_block)})
        for start in range(0, q_block * k_block * 2, q_block)
    ]
    assert diagonal_blocks(q_block, k_block) == max(stood_in)

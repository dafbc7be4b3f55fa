"""Every tool's result is a table, a figure and JSON, of both classes of models, and of caches read from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

import stream_lens as sl
from stream_lens.circuits.metrics import logit_difference
from stream_lens.circuits.retrieval import mask_retrieval_heads, retrieval_scores
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.tiny_models import tiny_bridge
from tests.circuits.reference import cut_at, segments_at
from tests.circuits.test_retrieval import answered_case

CONFIG = sl.StreamConfig(q_block=8, k_block=8, k=4)
SEGMENTS = segments_at(cut_at(*range(0, 97, 8)), 96)
TOKENS = tokens_of(1, 96)
METRIC = logit_difference(5, 7)
MODELS = {"bridge": lambda: tiny_bridge("LlamaForCausalLM"), "hooked": lambda: hooked_model("llama")}


@pytest.fixture(scope="module", params=["bridge", pytest.param("hooked", marks=pytest.mark.hooked)])
def model(request):
    return MODELS[request.param]()


def run(model: Any, seed: int, batch: int = 1) -> sl.SparseActivationCache:
    return sl.run_with_masks(model, tokens_of(batch, 96, seed), CONFIG)[1]


@pytest.fixture(scope="module")
def caches(model, tmp_path_factory) -> dict[str, list[sl.SparseActivationCache]]:
    """Two runs from memory, read back with and without their queries and keys, and a batch of two."""
    made = [run(model, seed) for seed in range(2)]
    folder = tmp_path_factory.mktemp("caches")
    kinds = {"memory": made}
    for name, scores in (("file", False), ("file with scores", True)):
        for number, cache in enumerate(made):
            cache.save(folder / f"{number}.safetensors", scores=scores)
        kinds[name] = [sl.SparseActivationCache.load(folder / f"{number}.safetensors") for number in range(2)]
    return {**kinds, "batch": [run(model, seed, batch=2) for seed in range(2)]}


def attributed(model: Any) -> sl.GateAttribution:
    return sl.gate_attribution(model, TOKENS, METRIC, CONFIG)


FROM_CACHES: dict[str, Callable[[list[Any]], Any]] = {
    "vertical_scores": lambda caches: sl.vertical_scores(caches, SEGMENTS),
    "receiver_heads": lambda caches: sl.receiver_heads(caches, SEGMENTS, top_n=3),
    "thought_anchors": lambda caches: sl.thought_anchors(caches, SEGMENTS),
    "mask_diff": lambda caches: sl.mask_diff(*caches),
    "mask_diff by segment": lambda caches: sl.mask_diff(*caches, SEGMENTS),
    "routes": lambda caches: sl.routes(caches[0], (20, 28), paths=2),
    "route_diff": lambda caches: sl.route_diff(*(sl.routes(cache, (20, 28), paths=2) for cache in caches)),
}
FROM_MODEL: dict[str, Callable[[Any], Any]] = {
    "minimal_k": lambda model: sl.minimal_k(model, TOKENS, CONFIG),
    "gate_attribution": attributed,
    "ablate": lambda model: sl.ablate(model, TOKENS, [sl.drop_heads("two", [(0, 1), (2, 0)])], METRIC, CONFIG),
    "heads_against_random": lambda model: sl.heads_against_random(model, [(TOKENS, METRIC)], [(0, 1)], CONFIG, seeds=2),
    "check_by_ablation": lambda model: sl.check_by_ablation(attributed(model), 4),
    "prune": lambda model: sl.prune(attributed(model), 0.5, random_seeds=1),
    "segment_suppression": lambda model: sl.segment_suppression(model, TOKENS, SEGMENTS, CONFIG, suppressed=[2, 3]),
    "retrieval_scores": lambda model: retrieval_scores(model, [answered_case(model, 0)], CONFIG.with_k(32)),
    "mask_retrieval_heads": lambda model: masked(model, [answered_case(model, 0)], CONFIG.with_k(32)),
}


def masked(model: Any, cases: list[sl.RetrievalCase], config: sl.StreamConfig) -> sl.HeadsAgainstRandom:
    return mask_retrieval_heads(model, cases, retrieval_scores(model, cases, config), config, top=2, seeds=2)


def check(result: Any) -> None:
    frame = result.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert len(frame)
    assert isinstance(result.plot(), go.Figure)
    assert isinstance(json.loads(result.to_json()), dict)


@pytest.mark.parametrize("source", ["memory", "file", "file with scores", "batch"])
@pytest.mark.parametrize("tool", FROM_CACHES)
def test_a_tool_that_needs_no_forward(tool, source, caches):
    check(FROM_CACHES[tool](caches[source]))


@pytest.mark.parametrize("tool", FROM_CACHES)
def test_a_file_with_scores_gives_the_same_table(tool, caches):
    frames = [FROM_CACHES[tool](caches[source]).to_frame() for source in ("memory", "file with scores")]
    pd.testing.assert_frame_equal(*frames)


@pytest.mark.parametrize("tool", FROM_MODEL)
def test_a_tool_that_runs_the_model(tool, model):
    check(FROM_MODEL[tool](model))
    assert not sl.is_streamed(model)


@pytest.mark.parametrize("tool", ["vertical_scores", "receiver_heads", "routes"])
def test_titles_say_what_was_run(tool, caches):
    said(FROM_CACHES[tool](caches["file"]))


@pytest.mark.parametrize(
    "tool", ["gate_attribution", "ablate", "heads_against_random", "check_by_ablation", "prune", "segment_suppression"]
)
def test_titles_say_what_the_model_ran(tool, model):
    said(FROM_MODEL[tool](model))


def said(result: Any) -> None:
    assert "T = 96, k = 4, " in result.plot().layout.title.text
    assert "of the causal half pruned" in result.plot().layout.title.text

"""The demo models, streamed: equal to dense with all blocks kept, and as good as dense at finding a needle."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import stream_lens as sl
from stream_lens.demo_models import DemoModelError
from stream_lens.tasks.answering import answered
from stream_lens.tasks.needle import needle_case

pytestmark = pytest.mark.slow


def _load(name: str, as_: str, n_ctx: int) -> Any:
    try:
        return sl.load_demo_model(name, as_=as_, n_ctx=n_ctx)  # type: ignore[arg-type]
    except DemoModelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "as_", "n_tokens"),
    [
        pytest.param("gemma-3-270m", "hooked", 600, marks=pytest.mark.hooked),
        ("gemma-3-270m", "bridge", 600),  # past the window of 512
        ("smollm2-135m", "bridge", 300),
    ],
)
def test_all_blocks_kept_equals_dense(name: str, as_: str, n_tokens: int) -> None:
    model = _load(name, as_, 1024)
    case = needle_case("single_1", model.tokenizer, tokens=n_tokens, seed=1)
    tokens = model.to_tokens(case.prompt)
    with torch.no_grad():
        before = model(tokens)
        with sl.stream(model, k=40):
            logits, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_pattern"))
        after = model(tokens)
    assert len(cache.patterns()) == model.cfg.n_layers
    assert (logits - before).abs().max() <= 1e-5 * before.abs().max().clamp(min=1)
    assert torch.equal(after, before)


@pytest.mark.hooked
@pytest.mark.skipif(
    not os.environ.get("STREAM_LENS_STUDIES"),
    reason="a study of 40 generations, a quarter of an hour on two cores: set STREAM_LENS_STUDIES=1 to run it",
)
def test_needle_at_2k_is_found_as_often_as_dense(record_property: pytest.FixtureRequest) -> None:
    model = _load("gemma-3-270m", "hooked", 2048)
    found = {"dense": 0, "sparse": 0}
    cases = [(depth, seed) for depth in (0.05, 0.3, 0.5, 0.7, 0.95) for seed in range(4)]
    for depth, seed in cases:
        case = needle_case("single_1", model.tokenizer, tokens=2000, depth=depth, seed=seed)
        found["dense"] += answered(model, case).found
        with sl.stream(model, q_block=32, k_block=32, k=16):
            found["sparse"] += answered(model, case).found
    print(f"needles found of n = {len(cases)}: dense {found['dense']}, sparse {found['sparse']}")
    assert found["sparse"] >= found["dense"], found

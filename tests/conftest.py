"""Shared by all tests: no network, one thread, and hypothesis settings for a shared machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Timing says nothing about correctness here, and drawing a shape is cheap beside running it.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

torch.set_num_threads(1)

# Triton reads this when it is first imported, which many test modules do, so it is set here: without a GPU the kernels
# of `tests/ops` run in its interpreter. torch.compile uses no Triton on CPUs.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def few_branches() -> Iterator[None]:
    """The search without branches for blocks that are not free, so that `oversample` is what a test says it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stream_lens.blocks.selection.LEAST_FREE", 1)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `hooked` where TransformerLens has no HookedTransformer."""
    if not any(item.get_closest_marker("hooked") for item in items):
        return
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        for item in items:
            if item.get_closest_marker("hooked"):
                item.add_marker(pytest.mark.skip(reason="this TransformerLens has no HookedTransformer: 3.x has"))

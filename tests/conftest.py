"""Shared by all tests: no network, one thread, and hypothesis settings for a shared machine."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

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

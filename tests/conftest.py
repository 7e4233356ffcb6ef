"""Settings of all tests: one thread (two processes run side by side), and the same hypothesis examples on every run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "seqloom", derandomize=True, deadline=None, max_examples=8, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
settings.load_profile("seqloom")


@pytest.fixture(autouse=True)
def _same_numbers_every_run():
    torch.manual_seed(0)

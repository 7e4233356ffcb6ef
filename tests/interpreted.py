"""Checks of Triton kernels by its interpreter, which has to be chosen before the kernels are imported: so a test file runs
itself once, as a script in a process of its own, and its tests read what that printed."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from seqloom.core.segments import Segments, Track, resolve


def run_checks(checks: Mapping[str, Callable[[], Any]]) -> None:
    """In the script: run every check from the same seed and print what it found, by name."""
    torch.set_num_threads(1)
    report = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        report[name] = check()
    print(json.dumps(report))


def report_of(file: str) -> dict[str, Any]:
    """In the tests: what `file` printed, run as a script."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def pattern(tokens: int, *edges: int) -> Segments:
    """Two rows: one that goes on, with boundaries at `edges`; one with pads left, inside and right, whose boundaries stand at
    these. The fields lie in memory by tokens first, as they do where rows are made of a wider tensor's columns."""
    ids = torch.ones(2, tokens, dtype=torch.int64)
    for edge in edges:
        ids[0, edge:] += 1
    ids[1, :2], ids[1, 7:13], ids[1, 13:], ids[1, max(tokens - 3, 14):] = 0, 0, 2, 0
    real, run = resolve(ids, Track(torch.tensor([1, 9]), torch.tensor([3, 3])))[0]
    run[1, 9:13] += 1
    if tokens > 17:
        run[1, tokens - 1] += 1
    return Segments(real.t().contiguous().t(), run.t().contiguous().t())

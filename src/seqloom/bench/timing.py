"""How every benchmark here times: interleaved rounds, medians, and ratios within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from seqloom.core import keep_pages


class Timing(NamedTuple):
    """Seconds per call: median over rounds, with the fastest and slowest round."""

    median: float
    least: float
    most: float


def interleave(calls: Mapping[str, Callable[[], object]], *, rounds: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """Time each call once per round, in turn, so that a machine's drift falls on all of them alike."""
    keep_pages()  # for all calls alike
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(values), min(values), max(values)) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

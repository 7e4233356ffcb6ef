"""How every benchmark here times: interleaved rounds, medians, and ratios within one run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from seqloom.core import keep_pages


class Timing(NamedTuple):
    """Seconds per call: median over rounds, with the fastest and slowest round."""

    median: float
    least: float
    most: float


class First(NamedTuple):
    """Of a first call: its seconds (compiling and tuning included), and the GiB it took on a CUDA device (elsewhere None)."""

    seconds: float
    peak_gib: float | None


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


def first(call: Callable[[], object]) -> First:
    """Make a call for the first time, and once more for its memory."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    seconds, peak = time.perf_counter() - start, None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        _wait()
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30
    return First(seconds, peak)


def attempt(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row that `make` returns, or one that says why there is none."""
    try:
        return make()
    except Exception as error:  # another library, or a form on a card it was not made for: a benchmark says so and goes on
        said = str(error).strip().splitlines()
        return {"name": name, "failed": f"failed: {type(error).__name__}: {said[0][:120] if said else 'no reason given'}"}


@functools.cache
def rates(device: str, dtype: torch.dtype) -> Mapping[str, float]:
    """What floors are made of: operations a second of a matrix product, and bytes a second of a copy, counting both ways."""
    cuda = torch.device(device).type == "cuda"
    size, count = (8192, 2**28) if cuda else (1024, 2**24)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    times = interleave({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds=7, warmup=3)
    return {"operations": 2 * size**3 / times["product"].least, "bytes": 2 * source.nbytes / times["copy"].least}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

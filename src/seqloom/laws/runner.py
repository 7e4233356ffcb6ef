"""Running the laws over the table, in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from seqloom.core import BadInput, near
from seqloom.laws.cases import cases
from seqloom.laws.law import LawResult, apply
from seqloom.laws.suite import LAWS


def run_laws(mixers: list[str] | None = None, device: str = "cpu", jobs: int = 1, *, laws: Iterable[str] | None = None,
             seen: Callable[[LawResult], None] | None = None) -> list[LawResult]:
    """Every law on every example of the named mixers (None: all), in the order of the tables.

    jobs: processes to use, each with one thread. laws: names of the laws to run (None: all). seen: called with each
    result as it comes, for a progress display.
    Raises: BadInput for an unknown mixer, law or device.
    """
    chosen = list(LAWS) if laws is None else list(laws)
    for name in chosen:
        if name not in LAWS:
            raise BadInput(f"no law {name!r}; {near(name, LAWS)}")
    check_device(device)
    todo = [(case.mixer, case.example, law, device) for case in cases(mixers) for law in chosen]
    tell = seen or (lambda result: None)
    if jobs <= 1:
        results = []
        for item in todo:
            results.append(_one(*item))
            tell(results[-1])
        return results
    # spawn: a forked copy of a process whose threads torch has started can hang
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(_one, *item): i for i, item in enumerate(todo)}
        found: dict[int, LawResult] = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            tell(found[futures[future]])
    return [found[i] for i in range(len(todo))]


def _one(mixer: str, example: str, law: str, device: str) -> LawResult:
    case = next(case for case in cases([mixer]) if case.example == example)
    return apply(LAWS[law], case, device)


def check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {device!r} cannot be used here: {str(error).strip().splitlines()[0]}") from error

"""Run a claim: calibrate the learning rate of each arm alike, run fresh seeds, compare the means, check the control."""

from __future__ import annotations

import dataclasses
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from seqloom.core import Claim
from seqloom.study.fit import fit

CALIBRATION_SEED = 1000  # never among the reported seeds
SEED_STRIDE = 17  # fit() uses seed and seed + 1


class Job(NamedTuple):
    """One fit of one arm, findable by a worker process that imports the recipe itself."""

    module: str
    index: int
    arm: str
    task: str  # "task" or "control"
    lr: float
    seed: int


class JobResult(NamedTuple):
    job: Job
    scores: dict[str, float]
    seconds: float
    parameters: int


def run_job(job: Job) -> JobResult:
    claim: Claim = importlib.import_module(job.module).CLAIMS[job.index]
    return run_arm(claim, job)


def run_arm(claim: Claim, job: Job) -> JobResult:
    """A task with `measure(arm, seed)` is a mechanism test and is not trained; any other is fitted."""
    task = getattr(claim, job.task)
    started = time.perf_counter()
    if hasattr(task, "measure"):
        scores = task.measure(claim.arms[job.arm], job.seed)
        return JobResult(job, scores, time.perf_counter() - started, 0)
    device = "cuda" if claim.device == "gpu" else "cpu"
    result = fit(claim.arms[job.arm], task, claim.budget, lr=job.lr, seed=job.seed, device=device)
    return JobResult(job, result.scores, time.perf_counter() - started, result.parameters)


class ClaimResult(NamedTuple):
    """Everything evidence keeps of a claim. `scores[arm][seed index]` are the named scores of one fresh seed."""

    text: str
    holds: bool
    lrs: dict[str, float]
    calibration: dict[str, dict[str, float]]
    scores: dict[str, list[dict[str, float]]]
    means: dict[str, dict[str, float]]
    control: dict[str, float]
    requirements: dict[str, bool]
    parameters: dict[str, int]
    seconds: float


def run_claim(module: str, index: int, *, jobs: int = 1) -> ClaimResult:
    """Run claim `index` of the recipe `module` (a dotted name) with `jobs` processes of one thread each."""
    claim: Claim = importlib.import_module(module).CLAIMS[index]
    started = time.perf_counter()
    trained = not hasattr(claim.task, "measure")
    with _pool(jobs) as run:
        lrs = {arm: claim.budget.lrs[0] for arm in claim.arms}
        calibration: dict[str, dict[str, float]] = {arm: {} for arm in claim.arms}
        if trained and len(claim.budget.lrs) > 1:
            trials = [Job(module, index, arm, "task", lr, CALIBRATION_SEED) for arm in claim.arms for lr in claim.budget.lrs]
            for result in run(trials):
                calibration[result.job.arm][f"{result.job.lr:g}"] = result.scores["score"]
            lrs = {arm: max(claim.budget.lrs, key=lambda lr: calibration[arm][f"{lr:g}"]) for arm in claim.arms}
        seeds = [claim.first_seed + SEED_STRIDE * i for i in range(claim.seeds)]
        work = [Job(module, index, arm, "task", lrs[arm], seed) for arm in claim.arms for seed in seeds]
        if claim.control is not None:
            rates = claim.budget.lrs if trained else claim.budget.lrs[:1]
            # an arm at chance on the task has no best rate there; whether it can learn at all is asked at every rate
            work += [Job(module, index, arm, "control", lr, seeds[0])
                     for arm in ("method", *claim.control_arms) for lr in rates]
        results = list(run(work))
    scores: dict[str, list[dict[str, float]]] = {arm: [] for arm in claim.arms}
    control: dict[str, float] = {}
    parameters: dict[str, int] = {}
    for result in results:
        if result.job.task == "control":
            control[result.job.arm] = max(result.scores["score"], control.get(result.job.arm, -math.inf))
        else:
            scores[result.job.arm].append(result.scores)
            parameters[result.job.arm] = result.parameters
    means = {arm: {name: statistics.fmean(s[name] for s in runs) for name in runs[0]} for arm, runs in scores.items()}
    requirements = {str(need): need.holds(means) for need in claim.require}
    for arm in claim.control_arms if claim.control is not None else ():
        text = f"control: {arm} reaches {claim.control_share:.0%} of the method"
        requirements[text] = control[arm] >= claim.control_share * control["method"]
    if trained:
        most, least = max(parameters.values()), min(parameters.values())
        requirements["parameters within 2 %"] = most <= 1.02 * least
    return ClaimResult(
        claim.text,
        all(requirements.values()),
        lrs,
        calibration,
        scores,
        means,
        control,
        requirements,
        parameters,
        time.perf_counter() - started,
    )


class _pool:
    """A map over jobs, in this process or in `jobs` fresh ones with one thread each."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Callable[[Iterable[Job]], Iterable[JobResult]]:
        if self.jobs <= 1:
            return lambda work: map(run_job, work)
        self.executor = ProcessPoolExecutor(
            self.jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        return lambda work: self.executor.map(run_job, work)

    def __exit__(self, *failure: Any) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)


def describe(claim: Claim) -> Mapping[str, Any]:
    """Plain data of what a claim runs: part of its digest."""
    return {field.name: repr(getattr(claim, field.name)) for field in dataclasses.fields(claim)}

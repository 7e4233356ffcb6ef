"""Fair comparison: every arm at equal parameters, equal data and equal steps, over several seeds."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from seqloom.core import BadInput, Budget, near
from seqloom.data import prepare
from seqloom.models.sequence import SequenceModel
from seqloom.study.arms import arm, equal_stacks, equalise, parameters_of
from seqloom.study.chart import Panel, Point, scatter
from seqloom.study.digest import commit, machine
from seqloom.study.fit import fit
from seqloom.study.map import CALIBRATION, KINDS
from seqloom.tasks import TASKS, TokenTask
from seqloom.train import TrainConfig, train

LATER = 8192  # tokens at which a state that grows is shown once more


@dataclass(frozen=True)
class RunRow:
    """One training run of one arm."""

    mixer: str
    seed: int
    score: float
    tokens_per_second: float
    peak_bytes: int | None
    seconds: float = 0.0
    lr: float | None = None


@dataclass(frozen=True)
class ArmRow:
    """One line of the table. `score` is bits per byte (lower is better) on text, accuracy on a generated task.

    calibration: score by learning rate on the calibration seed; `lr` is the best of them
    later_bytes: the state at 8,192 tokens, where it grows with the sequence
    """

    mixer: str
    parameters: int
    score: float
    spread: float
    tokens_per_second: float
    state_bytes: int
    peak_bytes: int | None
    runs: tuple[RunRow, ...]
    seconds: float = 0.0
    lr: float | None = None
    calibration: Mapping[str, float] = field(default_factory=dict)
    later_bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    metric: str
    lower_is_better: bool
    length: int
    rows: tuple[ArmRow, ...]

    def ranked(self) -> list[ArmRow]:
        return sorted(self.rows, key=lambda row: row.score if self.lower_is_better else -row.score)


def task_of(name: str) -> tuple[TokenTask, Mapping[str, Any]]:
    """The task called `name`, and the settings that go with it: those of the map first, then those of `seqloom list tasks`."""
    if name in KINDS:
        return KINDS[name].task, KINDS[name].settings
    if name in TASKS:
        return TASKS[name](), {}
    raise BadInput(f"no task {name!r}; {near(name, [*KINDS, *TASKS])}")


def compare_on_task(
    mixers: list[str],
    task: str | TokenTask,
    *,
    dim: int = 64,
    layers: int = 2,
    budget: Budget = Budget(steps=600),
    seeds: int = 3,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Arms named by mixer (or a pattern "a+b") on a generated task, at equal parameters.

    The rate is the best of the budget's on one calibration seed, tried alike for every arm; the scores are of fresh seeds.
    """
    settings: Mapping[str, Any] = {}
    if isinstance(task, str):
        task, settings = task_of(task)
    stacks = {name: arm(name, dim=dim, layers=layers, settings=settings) for name in mixers}
    equal = equal_stacks(stacks, vocab=max(task.vocab, task.classes))
    specs = {name: task.wrap(stack) for name, stack in equal.items()}
    length = task.sample(1, torch.Generator().manual_seed(0)).inputs.shape[1]  # type: ignore[attr-defined]
    work = [(name, specs[name], task, budget, lr, CALIBRATION) for name in mixers for lr in budget.lrs]
    with _executor(jobs) as pool:
        trials = _told(pool.map(_fit_row, work), say)
        rates = {name: min((-row.score, row.lr) for row in trials if row.mixer == name)[1] for name in mixers}
        final = [(name, specs[name], task, budget, rates[name], 17 * seed)
                 for name in mixers for seed in range(seeds)]
        rows = _told(pool.map(_fit_row, final), say)
    arms = tuple(_arm(name, specs[name], [row for row in rows if row.mixer == name], length,
                      [row for row in trials if row.mixer == name]) for name in mixers)
    return Comparison("accuracy", False, length, arms)


def _told(rows: Iterable[RunRow], say: Callable[[str], None]) -> list[RunRow]:
    kept = []
    for row in rows:
        say(f"{row.mixer}, rate {row.lr:g}, seed {row.seed}: {row.score:.4f} in {row.seconds:.1f} s")
        kept.append(row)
    return kept


def _fit_row(work: tuple) -> RunRow:
    name, spec, task, budget, lr, seed = work
    result = fit(spec, task, budget, lr=lr, seed=seed)
    tokens = budget.steps * budget.batch * task.sample(1, torch.Generator().manual_seed(0)).inputs.shape[1]
    return RunRow(name, seed, result.scores["score"], tokens / result.seconds, peak_memory(), result.seconds, lr)


def _arm(name: str, spec: SequenceModel, runs: list[RunRow], length: int, trials: Iterable[RunRow] = ()) -> ArmRow:
    scores = [run.score for run in runs]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    with torch.device("meta"):
        layer = spec.build()
        state, later = layer.state_bytes(length), layer.state_bytes(LATER)
    return ArmRow(
        name,
        parameters_of(spec),
        statistics.fmean(scores),
        statistics.stdev(scores) if len(scores) > 1 else 0.0,
        statistics.median(run.tokens_per_second for run in runs),
        state,
        max(peaks) if peaks else None,
        tuple(runs),
        statistics.median(run.seconds for run in runs),
        runs[0].lr,
        {f"{row.lr:g}": row.score for row in trials},
        later if later > state else None,
    )


def peak_memory() -> int | None:
    """Peak bytes of this process on the device in use: CUDA allocations, else resident memory; None where unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _serial:
    """The part of an executor that is used here, in this process."""

    def __enter__(self) -> _serial:
        return self

    def __exit__(self, *failure: Any) -> None:
        pass

    map = staticmethod(map)


def _executor(jobs: int) -> Any:
    """Processes that run one job each, so that peak memory is that of the job alone."""
    if jobs < 1:
        return _serial()
    return ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        max_tasks_per_child=1,
        initializer=torch.set_num_threads,
        initargs=(max(torch.get_num_threads() // jobs, 1),),
    )


def save(comparison: Comparison, folder: Path, *, about: Mapping[str, Any] | None = None) -> list[Path]:
    """comparison.json and comparison.svg in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **asdict(comparison),
        "about": dict(about or {}),
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    paths = [folder / "comparison.json", folder / "comparison.svg"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    paths[1].write_text(picture(comparison))
    return paths


def picture(comparison: Comparison) -> str:
    """Score against state bytes and against training time, as SVG: all seeds as dots, the mean labelled."""
    label = comparison.metric + (" (lower is better)" if comparison.lower_is_better else "")
    sides = []
    for facts, text, binary in (
        (lambda row: row.state_bytes, f"state at {comparison.length:,} tokens (hollow: where it grows, at {LATER:,})", True),
        (lambda row: row.seconds, "training (s, one run)", False),
    ):
        points = [
            Point(row.mixer, facts(row), tuple(run.score for run in row.runs), row.later_bytes is not None,
                  row.later_bytes if binary else None)
            for row in comparison.rows
        ]
        sides.append(Panel(points, text, label, binary=binary))
    return scatter(sides, title="Mixers at equal parameters, data and steps")


def compare_on_text(
    mixers: list[str],
    data: str,
    *,
    out: Path,
    dim: int = 128,
    layers: int = 3,
    vocab: int = 2048,
    context: int = 256,
    batch: int = 8,
    steps: int = 200,
    lr: float = 2e-3,
    seeds: int = 2,
    column: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Arms named by mixer (or a pattern "a+b") as language models on the same files, windows and steps: bits per byte held out.

    Every run is a process of its own, so that peak memory is that run's.
    """
    corpus = prepare(data, out / "data", column=column, vocab=vocab, say=say)
    stacks = {name: arm(name, dim=dim, layers=layers) for name in mixers}
    specs = equalise(stacks, vocab=corpus.vocab)
    # seeds in the outer loop: a machine's drift falls on all arms alike
    work = [
        (
            name,
            specs[name],
            TrainConfig(
                data=data,
                column=column,
                vocab=vocab,
                out=out / "runs" / f"{name}-{seed}",
                context=context,
                batch=batch,
                steps=steps,
                lr=lr,
                seed=seed,
                save_every=0,
            ),
            out / "data",
        )
        for seed in range(seeds)
        for name in mixers
    ]
    rows = []
    with _executor(1) as pool:
        for row in pool.map(_train_row, work):
            say(f"{row.mixer}, seed {row.seed}: {row.score:.4f} bits per byte, {row.tokens_per_second:,.0f} tokens/s")
            rows.append(row)
    arms = tuple(_arm(name, specs[name], [row for row in rows if row.mixer == name], context) for name in mixers)
    return Comparison("bits per byte", True, context, arms)


def _train_row(work: tuple) -> RunRow:
    name, spec, config, data = work
    corpus = prepare(config.data, data, column=config.column, vocab=config.vocab)
    if (config.out / "run.json").exists():  # a comparison that was stopped is begun anew, run by run
        shutil.rmtree(config.out)
    result = train(config, spec=spec, corpus=corpus, progress=False)
    assert result.score is not None  # a corpus of files has held-out text
    return RunRow(name, config.seed, result.score.bits_per_byte, result.tokens_per_second, peak_memory(), result.seconds,
                  config.lr)

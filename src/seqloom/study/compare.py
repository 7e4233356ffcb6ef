"""Fair comparison: every arm at equal parameters, equal data and equal steps, over several seeds."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from seqloom.core import BadInput, Budget, near
from seqloom.data import prepare
from seqloom.models.backbone import Stack
from seqloom.models.presets import stack_of
from seqloom.models.sequence import SequenceModel, language_model
from seqloom.parts import SwiGLU
from seqloom.study.digest import commit, machine
from seqloom.study.fit import count_parameters, fit
from seqloom.tasks import TASKS, TokenTask
from seqloom.train import TrainConfig, train

TOLERANCE = 0.02


def parameters_of(spec: SequenceModel) -> int:
    """Parameters of a model, counted without allocating it."""
    with torch.device("meta"):
        return count_parameters(spec.build())


def equalise(stacks: Mapping[str, Stack], *, vocab: int) -> dict[str, SequenceModel]:
    """Language models over `stacks` whose parameter counts agree within 2 %: the hidden width of the channel mixers
    is raised in the smaller ones until they match the largest."""
    models = {name: language_model(vocab=vocab, stack=stack) for name, stack in stacks.items()}
    target = max(parameters_of(model) for model in models.values())
    return {name: _widen(model, target, name) for name, model in models.items()}


def _widen(model: SequenceModel, target: int, name: str) -> SequenceModel:
    def at(extra: int) -> SequenceModel:
        blocks = tuple(
            replace(block, mlp=SwiGLU(hidden=(block.mlp.hidden or -(-model.stack.dim * 8 // 3 // 8) * 8) + extra))
            if isinstance(block.mlp, SwiGLU)
            else block
            for block in model.stack.blocks
        )
        return replace(model, stack=replace(model.stack, blocks=blocks))

    here, step = parameters_of(model), parameters_of(at(1)) - parameters_of(at(0))
    if step:
        model = at(round((target - here) / step))
    found = parameters_of(model)
    if abs(found - target) > TOLERANCE * target:
        raise BadInput(f"{name} cannot be brought within 2 % of {target:,} parameters (nearest {found:,}); give it a SwiGLU")
    return model


@dataclass(frozen=True)
class RunRow:
    """One training run of one arm."""

    mixer: str
    seed: int
    score: float
    tokens_per_second: float
    peak_bytes: int | None


@dataclass(frozen=True)
class ArmRow:
    """One line of the table. `score` is bits per byte (lower is better) on text, accuracy on a generated task."""

    mixer: str
    parameters: int
    score: float
    spread: float
    tokens_per_second: float
    state_bytes: int
    peak_bytes: int | None
    runs: tuple[RunRow, ...]


@dataclass(frozen=True)
class Comparison:
    metric: str
    lower_is_better: bool
    length: int
    rows: tuple[ArmRow, ...]

    def ranked(self) -> list[ArmRow]:
        return sorted(self.rows, key=lambda row: row.score if self.lower_is_better else -row.score)


def compare_on_task(
    mixers: list[str],
    task: str | TokenTask,
    *,
    dim: int = 64,
    layers: int = 2,
    budget: Budget = Budget(steps=600),
    seeds: int = 3,
    jobs: int = 1,
) -> Comparison:
    """Arms named by mixer (or a pattern "a+b") on a generated task; the best rate of the budget is taken per arm."""
    if isinstance(task, str):
        if task not in TASKS:
            raise BadInput(f"no task {task!r}; {near(task, TASKS)}")
        task = TASKS[task]()
    stacks = {name: stack_of(tuple(name.split("+")), dim=dim, layers=layers) for name in mixers}
    models = equalise(stacks, vocab=max(task.vocab, task.classes))
    specs = {name: task.wrap(model.stack) for name, model in models.items()}
    length = task.sample(1, torch.Generator().manual_seed(0)).inputs.shape[1]
    work = [(name, specs[name], task, budget, lr, 1000) for name in mixers for lr in budget.lrs]
    with _executor(jobs) as pool:
        trials = list(pool.map(_fit_row, work))
        best = {}
        for (name, *_, lr, _seed), row in zip(work, trials, strict=True):
            if name not in best or row.score > best[name][0]:
                best[name] = (row.score, lr)
        final = [(name, specs[name], task, budget, best[name][1], 17 * seed) for name in mixers for seed in range(seeds)]
        rows = list(pool.map(_fit_row, final))
    return Comparison(
        "accuracy",
        False,
        length,
        tuple(_arm(name, specs[name], [r for r in rows if r.mixer == name], length) for name in mixers),
    )


def _fit_row(work: tuple) -> RunRow:
    name, spec, task, budget, lr, seed = work
    result = fit(spec, task, budget, lr=lr, seed=seed)
    tokens = budget.steps * budget.batch * task.sample(1, torch.Generator().manual_seed(0)).inputs.shape[1]
    return RunRow(name, seed, result.scores["score"], tokens / result.seconds, peak_memory())


def _arm(name: str, spec: SequenceModel, runs: list[RunRow], length: int) -> ArmRow:
    scores = [run.score for run in runs]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    with torch.device("meta"):
        state = spec.build().state_bytes(length)
    return ArmRow(
        name,
        parameters_of(spec),
        statistics.fmean(scores),
        statistics.stdev(scores) if len(scores) > 1 else 0.0,
        statistics.median(run.tokens_per_second for run in runs),
        state,
        max(peaks) if peaks else None,
        tuple(runs),
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
    """comparison.json, comparison.png and comparison.svg in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **asdict(comparison),
        "about": dict(about or {}),
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path = folder / "comparison.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return [path, *plot(comparison, folder)]


def plot(comparison: Comparison, folder: Path) -> list[Path]:
    """Score against state bytes (all seeds as dots, the mean labelled): PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, facts, label in (
        (left, lambda row: row.state_bytes, f"state at {comparison.length:,} tokens (bytes)"),
        (right, lambda row: row.tokens_per_second, "training (tokens/s)"),
    ):
        for i, row in enumerate(comparison.rows):
            color = f"C{i % 10}"
            axis.scatter([facts(row)] * len(row.runs), [run.score for run in row.runs], s=14, alpha=0.5, color=color)
            axis.scatter([facts(row)], [row.score], s=46, color=color)
            axis.annotate(row.mixer, (facts(row), row.score), textcoords="offset points", xytext=(6, 4), fontsize=9)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.margins(x=0.25)
    left.set_ylabel(comparison.metric + (" (lower is better)" if comparison.lower_is_better else ""))
    paths = [folder / "comparison.png", folder / "comparison.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


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
    stacks = {name: stack_of(tuple(name.split("+")), dim=dim, layers=layers) for name in mixers}
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
    return RunRow(name, config.seed, result.score.bits_per_byte, result.tokens_per_second, peak_memory())

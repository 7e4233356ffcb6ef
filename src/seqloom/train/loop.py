"""The training loop: thin, on accelerate, exact on resume.

Batches are a pure function of (seed, step), so the data position is the step; model, optimiser and random state are in the
checkpoint. A run killed at any moment resumes to the same weights, bit for bit on CPU with the same build and thread count.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from seqloom.core import BadInput, FailedRun, form_report, require_extra
from seqloom.core.spec import pack, unpack
from seqloom.data import Corpus, TextBatch, prepare
from seqloom.models import KINDS
from seqloom.models.presets import resolve
from seqloom.models.sequence import SequenceModel, SequenceModelLayer
from seqloom.objectives import NextToken
from seqloom.train import checkpoint
from seqloom.train.config import TrainConfig
from seqloom.train.evaluate import Score, evaluate, first_bad_layer
from seqloom.train.optimiser import adamw, rate

RUN = "run.json"
WARM_STEPS = 3  # timed before the first real step


class TrainResult(NamedTuple):
    """out: folder of the model. losses: (step, nats per token). seconds: of training. score: on held-out documents."""

    out: Path
    model: SequenceModelLayer
    corpus: Corpus
    losses: list[tuple[int, float]]
    seconds: float
    tokens_per_second: float
    score: Score | None


def train(config: TrainConfig, *, spec: SequenceModel | None = None, corpus: Corpus | None = None, progress: bool = True,
          say: Callable[[str], None] = lambda text: None) -> TrainResult:
    """Train as `config` says. `spec` and `corpus` replace what the config names (comparisons share one corpus).

    Raises: BadInput for what cannot be trained; FailedRun when loss or gradient is not finite, or saving fails.
    """
    accelerator = Accelerator(mixed_precision=config.precision)
    facts: dict[str, Any] | None = None
    if config.resume is not None:
        config, spec, facts = _resume(config)
    out = config.out
    if facts is None:
        _claim(out)
    torch.manual_seed(config.seed)
    if corpus is None:
        with accelerator.main_process_first():
            corpus = prepare(config.data, out / "data", column=config.column, vocab=config.vocab, share=config.held_out)
    corpus.windows(config.context)
    spec = spec or resolve(config.model, vocab=corpus.vocab, changes=config.set)
    if not spec.stack.causal:
        raise BadInput("next-token training needs a causal model; this one has a mixer that sees the future")
    if spec.stem.vocab < corpus.vocab:
        raise BadInput(f"the model has {spec.stem.vocab} embeddings and the tokenizer {corpus.vocab} entries")
    torch.manual_seed(config.seed)
    model = spec.build()
    model.stack.checkpointing = config.checkpointing
    trainee = NextToken(model)
    optimiser = adamw(trainee, lr=config.lr, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2))
    trainee, optimiser = accelerator.prepare(trainee, optimiser)
    run = _Run(config, accelerator, trainee, optimiser, model, corpus)
    start = 0
    if facts is None:
        facts = {"steps": run.plan(say)}
        if accelerator.is_main_process:
            record = {"config": _plain(config), **pack(spec, KINDS), "facts": facts}
            draft = out / f".{RUN}"
            draft.write_text(json.dumps(record, indent=1) + "\n")
            draft.replace(out / RUN)
    else:
        found = checkpoint.latest(out / "checkpoints")
        if found is not None:
            start = checkpoint.restore(found, trainee, optimiser)
        say(f"resuming at step {start} of {facts['steps']}")
    losses, seconds, tokens = run.steps(start, facts, progress)
    score = evaluate(model, corpus, context=config.context) if len(corpus.held) > 1 else None
    result = TrainResult(out, model, corpus, losses, seconds, tokens / max(seconds, 1e-9), score)
    if accelerator.is_main_process:
        export(result, config)
    return result


class _Run:
    """The objects of a run, so that its steps read as steps."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainee: Any, optimiser: Any, model: SequenceModelLayer, corpus: Corpus):
        self.config, self.accelerator, self.trainee = config, accelerator, trainee
        self.optimiser, self.model, self.corpus = optimiser, model, corpus

    def parts(self, step: int) -> list[TextBatch]:
        """This process's rows of a step, cut into `accumulate` parts."""
        config = self.config
        whole = self.corpus.batch(step, seed=config.seed, batch=config.batch, context=config.context, reset=config.packing == "reset")
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        rows = TextBatch(*(None if part is None else part[mine].to(self.accelerator.device) for part in whole))
        size = max(rows.ids.shape[0] // config.accumulate, 1)
        return [TextBatch(*(None if part is None else part[i : i + size] for part in rows)) for i in range(0, rows.ids.shape[0], size)]

    def backward(self, step: int) -> float:
        """Gradients of a step; returns its loss in nats per token."""
        parts, losses = self.parts(step), []
        for part in parts:
            with self.accelerator.autocast():
                loss = self.trainee(part.ids, part.targets, part.segments)
            self.accelerator.backward(loss.total / len(parts))
            losses.append(loss.total.detach())
        return float(torch.stack(losses).mean())

    def plan(self, say: Callable[[str], None]) -> int:
        """Time some steps without taking them, say what the run will need, and return the number of steps."""
        config = self.config
        random = torch.get_rng_state()
        seconds = []
        for i in range(WARM_STEPS):
            begin = time.perf_counter()
            self.backward(i)
            seconds.append(time.perf_counter() - begin)
            self.optimiser.zero_grad(set_to_none=True)
        torch.set_rng_state(random)
        each = sorted(seconds)[0] * 1.05  # and the optimiser
        steps = config.steps or max(int((config.minutes or 5.0) * 60 / each), 1)
        parameters = sum(p.numel() for p in self.model.parameters())
        tokens = steps * config.batch * config.context
        say(
            f"{parameters:,} parameters; {steps:,} steps of {config.batch} x {config.context} tokens "
            f"({tokens / max(len(self.corpus.train), 1):.2f} epochs of {len(self.corpus.train):,}); "
            f"about {_clock(each * steps)} at {config.batch * config.context / each:,.0f} tokens/s; "
            f"memory about {_memory(parameters):,.0f} MB"
        )
        return steps

    def steps(self, start: int, facts: dict[str, Any], progress: bool) -> tuple[list[tuple[int, float]], float, int]:
        """Steps start .. facts["steps"], with log, checkpoints and progress. Returns losses, seconds and tokens."""
        config, accelerator, steps = self.config, self.accelerator, facts["steps"]
        losses: list[tuple[int, float]] = []
        begin = time.perf_counter()
        writers = _writers(config) if accelerator.is_main_process else []
        bar = _Bar(steps, start, progress and accelerator.is_main_process)
        self.trainee.train()
        step = start
        try:
            with (config.out / "log.jsonl").open("a") as log, bar:
                for step in range(start, steps):
                    loss = self.backward(step)
                    norm = float(accelerator.clip_grad_norm_(self.trainee.parameters(), config.clip))
                    if not (math.isfinite(loss) and math.isfinite(norm)):
                        raise self.broken(step, loss, norm)
                    factor = rate(step, steps, schedule=config.schedule, warmup=config.warmup)
                    for group in self.optimiser.param_groups:
                        group["lr"] = group["base"] * factor
                    self.optimiser.step()
                    self.optimiser.zero_grad(set_to_none=True)
                    seconds = time.perf_counter() - begin
                    speed = (step + 1 - start) * config.batch * config.context / seconds
                    bar.advance(loss, speed)
                    if (step + 1) % config.log_every == 0 or step + 1 == steps:
                        losses.append((step + 1, loss))
                        row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": config.lr * factor, "tokens_per_second": speed}
                        if accelerator.is_main_process:
                            log.write(json.dumps(row) + "\n")
                            log.flush()
                            for write in writers:
                                write(row)
                    if config.save_every and (step + 1) % config.save_every == 0:
                        self.save(step + 1, facts)
        except KeyboardInterrupt:
            self.save(step, facts)  # the interrupted step is taken again
            raise FailedRun(f"interrupted at step {step} of {steps}, which is saved; go on with: seqloom train --resume {config.out}") from None
        if not (config.save_every and steps % config.save_every == 0) and steps > start:
            self.save(steps, facts)
        return losses, time.perf_counter() - begin, (steps - start) * config.batch * config.context

    def save(self, step: int, facts: dict[str, Any]) -> None:
        self.accelerator.wait_for_everyone()
        checkpoint.save(self.config.out / "checkpoints", step, self.accelerator.unwrap_model(self.trainee), self.optimiser.optimizer,
                        facts, main=self.accelerator.is_main_process)

    def broken(self, step: int, loss: float, norm: float) -> FailedRun:
        """Step, batch and layer of a loss or gradient that is not finite."""
        part = self.parts(step)[0]
        where = first_bad_layer(self.model, part.ids, part.segments)
        rows = f"windows {step * self.config.batch} to {(step + 1) * self.config.batch - 1}"
        last = checkpoint.latest(self.config.out / "checkpoints")
        kept = f"; the last good checkpoint is step {last.step}" if last else ""
        return FailedRun(f"not finite at step {step}: loss {loss:g}, gradient norm {norm:g}; batch of {rows}, first in {where}{kept}; "
                         "a lower --lr or --clip may help")


def _resume(config: TrainConfig) -> tuple[TrainConfig, SequenceModel, dict[str, Any]]:
    """Settings, model and facts of an earlier run; one that was killed before its first checkpoint begins at step 0."""
    folder = config.resume
    path = folder / RUN
    if not path.is_file():
        raise BadInput(f"{folder} holds no run to resume: {RUN} is missing")
    stored = json.loads(path.read_text())
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    values = {name: _typed(value, fields[name]) for name, value in stored["config"].items() if name in fields}
    return TrainConfig(**{**values, "out": folder, "resume": None}), unpack(stored, KINDS, str(path)), stored["facts"]


def stored_corpus(folder: Path) -> tuple[Corpus, TrainConfig]:
    """The corpus and settings of the run in `folder`."""
    if not (folder / RUN).is_file():
        raise BadInput(f"{folder} holds no run, so nothing was held out there; say what to score with --data")
    config, _, _ = _resume(TrainConfig(resume=folder))
    return prepare(config.data, folder / "data", column=config.column, vocab=config.vocab, share=config.held_out), config


def _typed(value: Any, field: dataclasses.Field) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if "Path" in str(field.type) and value is not None else value


def _plain(config: TrainConfig) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()}


def _claim(out: Path) -> None:
    """Make the run's folder; one that already holds a run is not overwritten."""
    if (out / RUN).exists():
        raise BadInput(f"{out} already holds a run; go on with --resume {out}, or choose another --out")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written: {error.strerror}") from error


def export(result: TrainResult, config: TrainConfig) -> None:
    """The model, its tokenizer and its card, loadable by the Auto classes."""
    from seqloom import hub

    facts = {"data": config.data, "steps": result.losses[-1][0] if result.losses else 0, "seconds": round(result.seconds)}
    if result.score is not None:
        facts["held-out bits per byte"] = round(result.score.bits_per_byte, 4)
    hub.export(result.model, result.corpus.tokenizer, result.out, card=facts)


def _writers(config: TrainConfig) -> list[Callable[[dict[str, float]], None]]:
    """Further places to log to."""
    found: list[Callable[[dict[str, float]], None]] = []
    if "tensorboard" in config.log:
        board = require_extra("tensorboard", "tensorboard", "--log tensorboard") and require_extra(
            "torch.utils.tensorboard", "tensorboard", "--log tensorboard").SummaryWriter(str(config.out / "tensorboard"))
        found.append(lambda row: [board.add_scalar(name, value, row["step"]) for name, value in row.items() if name != "step"])
    if "trackio" in config.log:
        trackio = require_extra("trackio", "trackio", "--log trackio")
        trackio.init(project="seqloom", name=config.out.name, config=_plain(config))
        found.append(lambda row: trackio.log(row, step=row["step"]))
    return found


class _Bar:
    """A progress bar with loss, tokens/s, time left and the forms in use; silent when not wanted."""

    def __init__(self, steps: int, start: int, wanted: bool):
        self.bar = None
        if wanted:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"),
            )
            self.task = self.bar.add_task("", total=steps, completed=start, facts="")
        logging.getLogger("seqloom.forms").setLevel(logging.WARNING if wanted else logging.INFO)  # the bar shows them

    def __enter__(self) -> _Bar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, loss: float, speed: float) -> None:
        if self.bar is not None:
            forms = " ".join(f"{mixer}:{'/'.join(names)}" for mixer, names in form_report().items())
            self.bar.update(self.task, advance=1, facts=f"loss {loss:.3f}  {speed:,.0f} tokens/s  {forms}")


def _memory(parameters: int) -> float:
    """MB of weights, gradients and AdamW's two moments, and what this process already uses above them at most."""
    needed = parameters * 16 / 2**20
    if torch.cuda.is_available():
        return max(torch.cuda.max_memory_allocated() / 2**20 + parameters * 8 / 2**20, needed)
    try:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    except ImportError:
        return needed
    return peak + parameters * 8 / 2**20


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

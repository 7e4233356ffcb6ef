"""The training loop: thin, on accelerate, exact on resume.

Batches and random draws are pure functions of (seed, step), so the position in the data is the step; model and optimiser are
in the checkpoint. A run killed at any moment resumes to the same weights, bit for bit on CPU with the same build and thread
count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list

from seqloom.core import BadInput, FailedRun, keep_pages
from seqloom.core.spec import pack, unpack
from seqloom.data import Corpus, TextBatch, open_corpus, prepare
from seqloom.data import tokenizer as tokenizers
from seqloom.data.chat import check_template
from seqloom.data.corpus import IGNORE, TEMPLATE
from seqloom.models import KINDS
from seqloom.models.presets import resolve
from seqloom.models.sequence import SequenceModel, SequenceModelLayer
from seqloom.objectives import NextToken
from seqloom.train import checkpoint
from seqloom.train.config import FREE, TrainConfig
from seqloom.train.evaluate import Score, evaluate, first_bad_layer, last_bad_gradient
from seqloom.train.optimiser import adamw, rate
from seqloom.train.report import Bar, Log, Stop, clock, memory

RUN = "run.json"
WARM_STEPS = 3  # timed before the first real step
SKIPS = 20  # steps in a row that half precision may leave out while it looks for its scale


class TrainResult(NamedTuple):
    """out: folder of the model. losses: (step, nats per token), as logged. seconds: of training. score: on held-out
    documents."""

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

    Raises: BadInput for what cannot be trained; FailedRun when loss or gradient is not finite, saving fails, or the run is
    interrupted (Ctrl-C, SIGTERM), which saves first and says how to go on.
    """
    keep_pages()
    facts: dict[str, Any] | None = None
    if config.resume is not None:
        config, spec, facts = _resume(config)
    accelerator = _accelerator(config)
    out = config.out
    if spec is None:
        resolve(config.model, vocab=config.vocab, changes=config.set)  # mistakes in it come before data are read
    if not accelerator.is_main_process:
        say = lambda text: None  # noqa: E731
    with accelerator.main_process_first():
        if facts is None and accelerator.is_main_process:
            _claim(out)
        if corpus is None:
            corpus = _corpus(config, facts, say)
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
        facts = {"steps": run.plan(say), "corpus": str(corpus.folder.resolve()), "digest": corpus.digest}
        if accelerator.is_main_process:
            _store(out, {"config": _plain(config), **pack(spec, KINDS), "facts": facts})
        accelerator.wait_for_everyone()
    else:
        found = checkpoint.latest(out / "checkpoints")
        if found is not None:
            start = run.restore(found)
        say(f"resuming {out} at step {start} of {facts['steps']}")
    losses, seconds, tokens = run.steps(start, facts, progress)
    score = run.score() if len(corpus.held) > 1 else None
    result = TrainResult(out, run.plain(spec), corpus, losses, seconds, tokens / max(seconds, 1e-9), score)
    if accelerator.is_main_process:
        export(result, config, facts["steps"])
    accelerator.wait_for_everyone()
    return result


class _Run:
    """The objects of a run, so that its steps read as steps."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainee: Any, optimiser: Any, model: SequenceModelLayer,
                 corpus: Corpus):
        self.config, self.accelerator, self.trainee = config, accelerator, trainee
        self.optimiser, self.model, self.corpus = optimiser, model, corpus
        self.skipped = 0  # steps in a row that half precision left out
        self.sharded = any(hasattr(p, "full_tensor") for p in model.parameters())

    def parts(self, step: int) -> tuple[list[TextBatch], int]:
        """This process's rows of a step, cut into `accumulate` parts, and the number of targets in the whole step."""
        config, accelerator = self.config, self.accelerator
        whole = self.corpus.batch(step, seed=config.seed, batch=config.batch, context=config.context,
                                  reset=config.packing == "reset")
        size = config.batch // accelerator.num_processes // config.accumulate
        parts = []
        for i in range(config.accumulate):
            rows = slice((accelerator.process_index * config.accumulate + i) * size, None)
            parts.append(TextBatch(*(None if each is None else each[rows][:size].to(accelerator.device) for each in whole)))
        return parts, max(int((whole.targets != IGNORE).sum()), 1)

    def backward(self, step: int) -> torch.Tensor:
        """Gradients of a step: those of its mean loss over all targets, however it is cut and spread. Returns this process's
        part of that loss, in nats per token."""
        accelerator = self.accelerator
        torch.manual_seed(_seed(self.config.seed, step, accelerator.process_index))
        parts, count = self.parts(step)
        share = 1 / (len(parts) * accelerator.num_processes)
        losses = []
        for i, part in enumerate(parts):
            later = i + 1 < len(parts)
            with accelerator.no_sync(self.trainee) if later else contextlib.nullcontext(), accelerator.autocast():
                loss = self.trainee(part.ids, part.targets, part.segments, count=count, share=share, keep_state=False)
                accelerator.backward(loss.total * accelerator.num_processes)  # gradients are averaged over processes
            losses.append(loss.total.detach())
        return torch.stack(losses).sum()

    def agree(self, loss: torch.Tensor, norm: torch.Tensor, stop: bool) -> tuple[float, float, bool]:
        """Loss of the whole step, norm of its gradient, and whether any process was asked to stop: the same everywhere."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        facts = torch.stack([loss.float(), torch.full_like(loss, float(stop), dtype=torch.float32)])
        facts = torch.cat([self.accelerator.reduce(facts, "sum"), norm.float().reshape(1)])
        values = facts.tolist()
        return values[0], values[2], values[1] > 0

    def plan(self, say: Callable[[str], None]) -> int:
        """Time some steps without taking them, say what the run will need, and return the number of steps."""
        config, accelerator = self.config, self.accelerator
        seconds = []
        self.trainee.train()
        for i in range(WARM_STEPS):
            begin = time.perf_counter()
            loss = self.backward(i)
            if accelerator.scaler is None:
                loss, norm, _ = self.agree(loss, accelerator.clip_grad_norm_(self.trainee.parameters(), config.clip), False)
                self.check(i, loss, norm)
                for group in self.optimiser.param_groups:
                    group["lr"] = 0.0
                self.optimiser.step()  # at rate 0 it moves nothing but its own state, which is dropped below
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            self.optimiser.zero_grad(set_to_none=True)
        self.optimiser.optimizer.state.clear()
        each = statistics.median(seconds)
        steps = config.steps or max(int((config.minutes or 5.0) * 60 / each), 1)
        steps = broadcast_object_list([steps])[0]  # that of the first process, for all
        parameters = sum(p.numel() for p in self.model.parameters())
        tokens = config.batch * config.context
        say(
            f"{parameters:,} parameters; {steps:,} steps of {config.batch} x {config.context} tokens "
            f"({steps * tokens / max(len(self.corpus.train), 1):.2f} epochs of {len(self.corpus.train):,}); "
            f"about {clock(each * steps)} at {tokens / each:,.0f} tokens/s; memory about {memory():,.0f} MB"
        )
        return steps

    def steps(self, start: int, facts: dict[str, Any], progress: bool) -> tuple[list[tuple[int, float]], float, int]:
        """Steps start .. facts["steps"], with log, checkpoints and progress. Returns losses, seconds and tokens."""
        config, accelerator, steps = self.config, self.accelerator, facts["steps"]
        losses: list[tuple[int, float]] = []
        tokens, saved = config.batch * config.context, start
        main = accelerator.is_main_process
        self.trainee.train()
        begin = time.perf_counter()
        mixers = {block.mixer.spec.name() for block in self.model.stack.blocks}
        bar = Bar(steps, start, mixers, progress and main)
        with Stop() as stop, Log(config, start, _plain(config), wanted=main) as log, bar:
            for step in range(start, steps):
                loss = self.backward(step)
                norm = accelerator.clip_grad_norm_(self.trainee.parameters(), config.clip)
                loss, norm, stopping = self.agree(loss, norm, stop.asked)
                self.check(step, loss, norm)
                factor = rate(step, steps, schedule=config.schedule, warmup=config.warmup)
                for group in self.optimiser.param_groups:
                    group["lr"] = group["base"] * factor
                self.optimiser.step()
                self.optimiser.zero_grad(set_to_none=True)
                done = step + 1
                speed = (done - start) * tokens / (time.perf_counter() - begin)
                bar.advance(loss, speed)
                if done % config.log_every == 0 or done == steps:
                    losses.append((done, loss))
                    log.write({"step": done, "loss": loss, "grad_norm": norm, "lr": config.lr * factor,
                               "tokens_per_second": speed})
                if config.eval_every and done % config.eval_every == 0 and len(self.corpus.held) > 1:
                    log.write({"step": done, "held_out_bits_per_byte": self.score().bits_per_byte})
                if stopping or done == steps or (config.save_every and done % config.save_every == 0):
                    self.save(done, facts)
                    saved = done
                if stopping and done < steps:
                    raise FailedRun(f"interrupted after step {saved} of {steps}, which is saved; "
                                    f"go on with: seqloom train --resume {config.out}")
        return losses, time.perf_counter() - begin, (steps - start) * tokens

    def save(self, step: int, facts: dict[str, Any]) -> None:
        self.accelerator.wait_for_everyone()
        scaler = self.accelerator.scaler
        facts = facts if scaler is None else {**facts, "scaler": scaler.state_dict()}
        checkpoint.save(self.config.out / "checkpoints", step, self.accelerator.unwrap_model(self.trainee),
                        self.optimiser.optimizer, facts, main=self.accelerator.is_main_process)

    def restore(self, found: checkpoint.Checkpoint) -> int:
        if self.accelerator.scaler is not None and found.facts.get("scaler"):
            self.accelerator.scaler.load_state_dict(found.facts["scaler"])
        return checkpoint.restore(found, self.accelerator.unwrap_model(self.trainee), self.optimiser.optimizer)

    def score(self) -> Score:
        """Held-out score, in the precision of training."""
        objective = self.trainee if self.sharded else NextToken(self.model)
        with self.accelerator.autocast():
            return evaluate(self.model, self.corpus, context=self.config.context, objective=objective)

    def plain(self, spec: SequenceModel) -> SequenceModelLayer:
        """The trained model as an ordinary module: itself, or put together where processes hold parts of it."""
        if not self.sharded:
            return self.model
        tensors = checkpoint.tensors_of(self.model)
        whole = spec.build()
        whole.load_state_dict(tensors, strict=False)  # tied tensors are there once
        return whole

    def check(self, step: int, loss: float, norm: float) -> None:
        """Raise FailedRun with step, batch and layer if loss or gradient is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            return
        if self.accelerator.scaler is not None and math.isfinite(loss) and self.skipped < SKIPS:
            self.skipped += 1  # the scale was too large: the scaler leaves this step out and lowers it
            return
        where = None
        if not self.sharded:
            with self.accelerator.autocast():
                found = [first_bad_layer(self.model, part.ids, part.segments) for part in self.parts(step)[0]]
            where = next(filter(None, found), None)
            if where is None:
                self.optimiser.zero_grad(set_to_none=True)
                self.backward(step)  # again: clipping by a norm that is not finite has spread it over all gradients
                parameter = last_bad_gradient(self.model)
                where = f"the backward pass, at {parameter}" if parameter else "the loss"
        rows = f"windows {step * self.config.batch} to {(step + 1) * self.config.batch - 1}"
        last = checkpoint.latest(self.config.out / "checkpoints")
        kept = f"; the last good checkpoint is step {last.step}" if last else ""
        raise FailedRun(f"not finite at step {step + 1}: loss {loss:g}, gradient norm {norm:g}, in the batch of {rows}"
                        f"{f', first in {where}' if where else ''}{kept}; a lower --lr or --clip may help")


def _seed(seed: int, step: int, process: int) -> int:
    """Of the random draws (dropout) in a step of a process: nothing has to be stored to draw the same again."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=8).digest(), "big") >> 1


def _accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of this machine: device, processes and sharding are its own settings (`accelerate launch`)."""
    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") != config.precision:
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    try:
        accelerator = Accelerator(mixed_precision=config.precision)
    except ValueError as error:  # half precision where the device has none
        raise BadInput(f"--precision {config.precision}: {error}") from error
    if config.precision == "fp16" and accelerator.scaler is None:  # accelerate would go on in float32 without a word
        raise BadInput(f"--precision fp16 needs a GPU, and this run is on {accelerator.device.type}; bf16 runs anywhere")
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise BadInput("sharding needs fsdp_version 2 in accelerate's configuration, not 1")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise BadInput(f"{kind.value} is not supported; data parallel and FSDP2 are")
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # parameters travel and stay in float32, so that those marked keep_float32 do; autocast lowers the products
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    rows = accelerator.num_processes * config.accumulate
    if config.batch % rows:
        raise BadInput(f"a batch of {config.batch} windows does not split over {accelerator.num_processes} processes in "
                       f"{config.accumulate} parts; nearest is {max(config.batch // rows, 1) * rows}")
    return accelerator


def _corpus(config: TrainConfig, facts: dict[str, Any] | None, say: Callable[[str], None]) -> Corpus:
    """The tokens of a run: those it began with, wherever its data are now."""
    if facts is not None:
        for place in (Path(facts["corpus"]), config.out / "data" / Path(facts["corpus"]).name):
            with contextlib.suppress(BadInput):
                return open_corpus(place)
    template = None
    if config.chat_template is not None:
        try:
            template = check_template(config.chat_template.read_text(encoding="utf-8"), str(config.chat_template))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the chat template {config.chat_template} cannot be read: {error}") from error
    given = None if config.tokenizer is None else tokenizers.load(config.tokenizer)
    corpus = prepare(config.data, config.out / "data", column=config.column, vocab=config.vocab, share=config.held_out,
                     tokenizer=given, template=template, say=say)
    if facts is not None and corpus.digest != facts["digest"]:
        raise BadInput(f"{config.data} is not what the run in {config.out} began with, and its tokens are gone; "
                       "start a new run")
    return corpus


def _resume(config: TrainConfig) -> tuple[TrainConfig, SequenceModel, dict[str, Any]]:
    """Settings, model and facts of an earlier run; one that was killed before its first checkpoint begins at step 0."""
    folder = config.resume
    path = folder / RUN
    if not path.is_file():
        raise BadInput(f"{folder} holds no run to resume: {RUN} is missing")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings, facts = stored["config"], stored["facts"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged: {error!r}") from error
    spec = unpack(stored, KINDS, str(path))
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    values = {name: _typed(value, fields[name]) for name, value in settings.items() if name in fields}
    asked = TrainConfig(resume=folder)
    for name in fields.keys() - {"resume", "out"}:
        given = getattr(config, name)
        if given == getattr(asked, name) or given == values.get(name):
            continue
        if name not in FREE:
            raise BadInput(f"--{name.replace('_', '-')} is {values.get(name)} in the run to resume and cannot become {given}; "
                           f"only {', '.join(FREE)} may change")
        values[name] = given
    return TrainConfig(**{**values, "out": folder, "resume": None}), spec, facts


def stored_corpus(folder: Path) -> tuple[Corpus, TrainConfig]:
    """The corpus and settings of the run in `folder`. Raises: BadInput if there is none."""
    if not (folder / RUN).is_file():
        raise BadInput(f"{folder} holds no run, so nothing was held out there; say what to score with --data")
    config, _, facts = _resume(TrainConfig(resume=folder))
    return _corpus(config, facts, lambda text: None), config


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


def _store(out: Path, record: dict[str, Any]) -> None:
    draft = out / f".{RUN}"
    try:
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.replace(out / RUN)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise FailedRun(f"{out / RUN} cannot be written: {error.strerror}") from error


def export(result: TrainResult, config: TrainConfig, steps: int) -> None:
    """The model, its tokenizer and its card, loadable by the Auto classes."""
    from seqloom import hub

    facts: dict[str, Any] = {"data": config.data, "steps": steps, "context": config.context, "seconds": round(result.seconds)}
    if result.score is not None:
        facts["held-out bits per byte"] = round(result.score.bits_per_byte, 4)
    hub.export(result.model, result.corpus.tokenizer, result.out, card=facts)
    if result.corpus.template is not None:
        try:
            (result.out / TEMPLATE).write_text(result.corpus.template, encoding="utf-8")
        except OSError as error:
            raise FailedRun(f"{result.out / TEMPLATE} cannot be written: {error.strerror}") from error

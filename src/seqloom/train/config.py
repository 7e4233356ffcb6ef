"""What a training run is: everything that decides its numbers, and how it saves and logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seqloom.core import BadInput

FREE = ("eval_every", "save_every", "log_every", "log")  # what a resumed run may change: no number depends on them


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run on text."""

    data: str = "stdlib"
    """A file, a folder, 'stdlib' (the standard library's own source) or 'hf:NAME'."""
    column: str | None = None
    """Text column of a table. By default 'text', or 'prompt' and 'completion' (learnt), or 'messages' (the assistant's are
    learnt)."""
    chat_template: Path | None = None
    """Jinja file that turns 'messages' into text, {% generation %} blocks around what is learnt; plain paragraphs by
    default."""
    model: str = "hybrid-tiny"
    """A model of `seqloom list models`, or a YAML file with a model."""
    set: tuple[str, ...] = ()
    """Changes to the model, as dotted.path=value (for example stack.dim=192)."""
    out: Path = Path("runs/model")
    """Folder of the run: log, checkpoints, and at the end the model."""
    resume: Path | None = None
    """Go on with the run in this folder; its settings are read from there, and only how it saves and logs can be changed."""
    vocab: int = 4096
    """Entries of the byte-level BPE learnt from the training documents; 257 is one token a byte."""
    tokenizer: Path | None = None
    """Folder with a tokenizer.json to use instead of learning one."""
    held_out: float = 0.05
    """Share of the bytes held out, by document."""
    context: int = 512
    """Tokens of a training window."""
    packing: Literal["reset", "continue"] = "reset"
    """What a document that begins inside a window sees: nothing before it, or all of the window."""
    batch: int = 8
    """Windows of an optimiser step, over all processes."""
    accumulate: int = 1
    """Parts a step is cut into, to save memory; the gradient is the same."""
    steps: int | None = None
    """Optimiser steps; or give --minutes."""
    minutes: float | None = None
    """Length of training, from which the steps are set by timing a few; 5 where neither is given."""
    lr: float = 2e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """wsd: constant, then a linear fall over the last fifth."""
    warmup: float = 0.05
    """Share of the steps with a rising rate."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, by accelerate."""
    checkpointing: bool = False
    """Recompute each block in the backward pass, to save memory."""
    seed: int = 0
    eval_every: int = 0
    """Steps between scores on the held-out documents, in the log; 0 scores at the end only."""
    save_every: int = 200
    """Steps between checkpoints; 0 saves at the end only."""
    log_every: int = 10
    """Steps between lines of the log."""
    log: tuple[Literal["tensorboard", "trackio"], ...] = ()
    """More places to log to, besides log.jsonl."""

    def __post_init__(self) -> None:
        for name in ("context", "batch", "accumulate", "log_every", "vocab"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("save_every", "eval_every", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise BadInput(f"--{name.replace('_', '-')} must not be below 0, but is {getattr(self, name):g}")
        if self.steps is not None and self.minutes is not None:
            raise BadInput("--steps and --minutes both given; give one")
        if (self.steps is not None and self.steps < 1) or (self.minutes is not None and not self.minutes > 0):
            raise BadInput("--steps and --minutes must be above 0")
        if self.batch % self.accumulate:
            raise BadInput(f"a batch of {self.batch} does not split into {self.accumulate} equal parts")
        if not 0 <= self.held_out < 1:
            raise BadInput(f"--held-out is a share of the bytes in [0, 1), not {self.held_out:g}")
        for name in ("beta1", "beta2", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"--{name} must be in [0, 1), not {getattr(self, name):g}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise BadInput(f"--{name} must be above 0, not {getattr(self, name):g}")

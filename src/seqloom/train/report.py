"""What a run shows while it runs: the log, the progress bar, and being asked to stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from seqloom.core import FailedRun, form_report, require_extra
from seqloom.train.config import TrainConfig

LOG = "log.jsonl"


class Stop:
    """Inside the block Ctrl-C and SIGTERM set `asked`, to be looked at between steps; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be handled
            for kind in (signal.SIGINT, signal.SIGTERM):
                self.before[kind] = signal.signal(kind, self._ask)
        return self

    def __exit__(self, *failure: Any) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _ask(self, kind: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Log:
    """log.jsonl in the run's folder, one row a line, and the places that `config.log` names. On resume, rows after step
    `start` go."""

    def __init__(self, config: TrainConfig, start: int, settings: dict[str, Any], *, wanted: bool = True):
        self.config, self.start, self.settings, self.wanted = config, start, settings, wanted
        self.path = config.out / LOG
        self.more: list[Callable[[int, dict[str, float]], Any]] = []
        self.close: list[Callable[[], None]] = []

    def __enter__(self) -> Log:
        if self.wanted:
            try:
                kept = [row for row in rows(self.path) if row["step"] <= self.start]
                draft = self.path.with_name(f".{LOG}")
                draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
                draft.replace(self.path)
                self.file = self.path.open("a")
            except OSError as error:
                raise FailedRun(f"{self.path} cannot be written: {error.strerror}") from error
            self._open()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self.wanted:
            with suppress(OSError):
                self.file.close()
            for close in self.close:
                close()

    def write(self, row: dict[str, float]) -> None:
        if not self.wanted:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise FailedRun(f"{self.path} cannot be written: {error.strerror}; "
                            f"go on with: seqloom train --resume {self.config.out}") from error
        for write in self.more:
            write(row["step"], {name: value for name, value in row.items() if name != "step"})

    def _open(self) -> None:
        if "tensorboard" in self.config.log:
            require_extra("tensorboard", "tensorboard", "--log tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(self.config.out / "tensorboard"), purge_step=self.start + 1)
            self.more.append(lambda step, row: [board.add_scalar(name, value, step) for name, value in row.items()])
            self.close.append(board.close)
        if "trackio" in self.config.log:
            trackio = require_extra("trackio", "trackio", "--log trackio")
            trackio.init(project="seqloom", name=self.config.out.name, config=self.settings)
            self.more.append(lambda step, row: trackio.log(row, step=step))
            self.close.append(trackio.finish)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log.jsonl; a line that a kill cut short is left out."""
    if path.is_file():
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    yield row


class Bar:
    """A progress bar with loss, tokens/s, time left and the forms of the `mixers` in use; silent when not wanted."""

    def __init__(self, steps: int, start: int, mixers: Collection[str], wanted: bool):
        self.bar, self.mixers = None, mixers
        if wanted:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("training"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, TextColumn("{task.fields[facts]}"), console=Console(file=sys.stderr))
            self.task = self.bar.add_task("", total=steps, completed=start, facts="")
            self.forms: dict[str, list[str]] = {}

    def __enter__(self) -> Bar:
        if self.bar is not None:
            self.log = logging.getLogger("seqloom.forms")
            self.level = self.log.level
            self.log.setLevel(logging.WARNING)  # the bar shows them
            self.bar.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.log.setLevel(self.level)

    def advance(self, loss: float, speed: float) -> None:
        if self.bar is not None:
            forms = {name: found for name, found in form_report().items() if name in self.mixers}
            if forms != self.forms:  # above the bar, when they are first used
                self.bar.console.print("forms: " + "; ".join(f"{name} {', '.join(found)}" for name, found in forms.items()))
                self.forms = forms
            self.bar.update(self.task, advance=1, facts=f"loss {loss:.3f} {speed:,.0f} tokens/s")


def memory() -> float:
    """MB that this process has used at most: once some steps were timed, weights, gradients, moments and activations are in
    it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if os.name == "nt":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

"""Remembering one thing through noise, and how far a stack's forget gates reach, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqloom.core.mixer import accumulator
from seqloom.models.backbone import Stack
from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask


@dataclass(frozen=True, kw_only=True)
class LongMemory(TokenTask):
    """The first token is one of `symbols`, then comes noise of another alphabet; the last token asks for the first.

        c . x q z x ... y q ? -> c

    Ids: symbols, then as many noise tokens, then the query. Beside "score", the share answered right (chance 1 / symbols,
    optimum 1), "rise" is the least increase of the mean forget value from one layer to the next (0 or less: it does not rise
    with depth; a gate's values lie in (0, 1)). Source: [hgrn] Works when 7.
    """

    length: int = 48
    symbols: int = 16

    @property
    def vocab(self) -> int:
        return 2 * self.symbols + 1

    @property
    def classes(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"LongMemory: a length of at least 2 holds the symbol and the question, found {self.length}")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        ids = self.symbols + torch.randint(self.symbols, (batch, self.length), generator=generator)
        answer = torch.randint(self.symbols, (batch,), generator=generator)
        ids[:, 0], ids[:, -1] = answer, 2 * self.symbols
        targets = torch.full_like(ids, IGNORE)
        targets[:, -1] = answer
        return Batch(ids, targets)

    def tests(self) -> Mapping[str, Task]:
        return {"score": self, "rise": _Rise(self)}  # type: ignore[dict-item]


@dataclass(frozen=True)
class _Rise:
    """Scores where the forget gates of a trained model stand."""

    task: LongMemory

    def score(self, model: SequenceModelLayer, seed: int) -> float:
        inputs = self.task.sample(128, torch.Generator().manual_seed(seed)).inputs.to(next(model.parameters()).device)
        model.eval()
        with torch.no_grad(), forget_gates(model.stack) as gates:
            model(inputs)
        means = torch.stack([gate.double().mean() for gate in gates])
        return float(means.diff().min())


@contextlib.contextmanager
def forget_gates(stack: nn.Module) -> Iterator[list[Tensor]]:
    """The forget gates [B, T, D] of every layer that has them (`gates(x, dtype)`), in order, of the passes inside the block.

    Raises: ValueError if no layer has any.
    """
    found: list[Tensor] = []
    mixers = [block.mixer for block in stack.blocks if hasattr(block.mixer, "gates")]
    if not mixers:
        raise ValueError("no mixer of this stack has forget gates to look at; HGRN has")

    def look(mixer: nn.Module, args: tuple) -> None:
        found.append(mixer.gates(args[0], accumulator(args[0].dtype))[0])

    handles = [mixer.register_forward_pre_hook(look) for mixer in mixers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class ForgetHorizon:
    """What the last layer of an untrained stack keeps over `steps` tokens of noise: log10 of the product of its forget values.

        f_1 f_2 ... f_64  ->  log10 prod f_t        (mean over rows and channels; 0 keeps all, -20 nothing)

    "score" is that of the last layer, "rise" the least increase from one layer to the next. No chance level; the optimum is 0.
    Source: [hgrn] Works when 8.
    """

    steps: int = 64
    rows: int = 4

    def measure(self, arm: Stack, seed: int) -> Mapping[str, float]:
        make = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.steps, arm.dim, generator=make)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            stack = arm.build()
            with forget_gates(stack) as gates:
                stack(x)
        decades = torch.stack([gate.double().log10().sum(1).mean() for gate in gates])
        return {"score": float(decades[-1]), "rise": float(decades.diff().min())}


__all__ = ["ForgetHorizon", "LongMemory", "forget_gates"]

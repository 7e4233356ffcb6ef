"""One thing remembered through noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from seqloom.interpret.gates import forget_gates
from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import IGNORE, Batch, Task
from seqloom.tasks.synthetic.alphabets import SymbolTask


@dataclass(frozen=True, kw_only=True)
class InductionHeads(SymbolTask):
    """A trigger token appears once inside noise and once at the end: name the token that followed it.

        x f # c d a e b # -> c

    Ids: noise 0..symbols-1, then the trigger. Chance: 1 / symbols. Source: [mamba] section 4.1.2.
    """

    length: int = 64
    symbols: int = 15

    others = 1  # the trigger

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        ids = torch.randint(self.symbols, (batch, self.length), generator=generator)
        place = torch.randint(self.length - 3, (batch, 1), generator=generator)
        answer = ids.gather(1, place + 1)
        ids = ids.scatter(1, place, self.symbols)
        ids[:, -1] = self.symbols
        targets = torch.full_like(ids, IGNORE)
        targets[:, -1:] = answer
        return Batch(ids, targets)


@dataclass(frozen=True, kw_only=True)
class LongMemory(SymbolTask):
    """The first token is one of `symbols`, then comes noise of another alphabet; the last token asks for the first.

        c . x q z x ... y q ? -> c

    Ids: symbols, then as many noise tokens, then the query. Beside "score", the share answered right (chance 1 / symbols,
    optimum 1), "rise" is the least increase of the mean forget value from one layer to the next (0 or less: it does not rise
    with depth; a gate's values lie in (0, 1)). Source: [hgrn] Works when 7.
    """

    length: int = 48

    @property
    def others(self) -> int:
        return self.symbols + 1

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

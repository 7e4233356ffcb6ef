"""What a stack does before any training: its first loss, and how far its forget gates reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from seqloom.interpret.gates import forget_gates
from seqloom.models.backbone import Stack
from seqloom.tasks.synthetic.majority import Majority


@dataclass(frozen=True, kw_only=True)
class InitialLoss:
    """The loss of an untrained stack on `Majority`, in powers of ten: what a state that grows with the length does to it.

    An arm is a stack. One score a length ("at_50_tokens"), "score" that of the longest. About 0 to 3 where the state only
    sums. Computed in float64. Source: [selective-ssm-bounds] Works when 6 (b).
    """

    lengths: tuple[int, ...] = (50, 300)
    rows: int = 256

    def measure(self, stack: Stack, seed: int) -> Mapping[str, float]:
        scores = {f"at_{length}_tokens": self._loss(stack, length, seed) for length in self.lengths}
        return {"score": scores[f"at_{max(self.lengths)}_tokens"], **scores}

    @torch.no_grad()
    def _loss(self, stack: Stack, length: int, seed: int) -> float:
        task = Majority(length=length, rows=None)
        torch.manual_seed(seed)
        model = task.wrap(stack).build().double().eval()
        inputs, targets = task.sample(self.rows, torch.Generator().manual_seed(seed + 1))
        logits = model(inputs).logits
        return math.log10(float(torch.nn.functional.cross_entropy(logits, targets)))


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

"""Train a small model on a generated task: the arm of a claim or of a comparison.

Deliberately plain (one device, one optimiser, fresh data every step): claims run thousands of such fits, and what
differs between arms must be the spec alone. Training on files is `train/`.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch

from seqloom.core import Budget
from seqloom.core.marks import marks
from seqloom.models.backbone import Stack
from seqloom.models.sequence import SequenceModel, SequenceModelLayer
from seqloom.tasks import Task

TEST_SEED = 10_000_019  # far from every training seed, the same rows for every arm


class Fit(NamedTuple):
    """scores by name, the model, seconds of training, parameters."""

    scores: dict[str, float]
    model: SequenceModelLayer
    seconds: float
    parameters: int


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share `warmup` of the steps, then a cosine to zero."""
    rise = max(int(steps * warmup), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def fit(
    arm: Stack | SequenceModel, task: Task, budget: Budget, *, lr: float, seed: int, device: torch.device | str = "cpu"
) -> Fit:
    """Train `arm`, a whole model or a stack for the task to wrap, for `budget` at rate `lr`; score it on `task.tests()`."""
    torch.manual_seed(seed)
    model = (arm if isinstance(arm, SequenceModel) else task.wrap(arm)).build().to(device)
    groups: dict[tuple[float, bool], list] = {}
    for parameter in model.parameters():
        facts = marks(parameter)
        groups.setdefault((facts["lr_scale"], facts["no_decay"]), []).append(parameter)
    optimiser = torch.optim.AdamW(
        [
            {"params": members, "lr": lr * scale, "base": lr * scale, "weight_decay": 0.0 if bare else budget.weight_decay}
            for (scale, bare), members in groups.items()
        ],
        betas=budget.betas,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    started = time.perf_counter()
    model.train()
    for step in range(budget.steps):
        inputs, targets = task.sample(budget.batch, generator).to(device)
        output = model(inputs)
        loss = task.loss(output, targets) + sum(value.mean() for name, value in output.aux.items() if name.endswith("loss"))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), budget.clip)
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * schedule(step, budget.steps, budget.warmup)
        optimiser.step()
    seconds = time.perf_counter() - started
    scores = {name: test.score(model, TEST_SEED) for name, test in task.tests().items()}
    return Fit(scores, model, seconds, count_parameters(model))


def count_parameters(model: Any) -> int:
    """Trainable parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())

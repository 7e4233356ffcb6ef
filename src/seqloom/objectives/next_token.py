"""The next token: cross entropy of each token under the scores of the one before it, in nats."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqloom.core import Info
from seqloom.models.sequence import SequenceModelLayer

IGNORE = -100


class Loss(NamedTuple):
    """total: what to minimise. nats: sum of cross entropies over `count` targets. state: of the model, for the next window."""

    total: Tensor
    nats: Tensor
    count: Tensor
    state: Any = None


class NextToken(nn.Module):
    """Wraps a language model: `objective(ids, targets, segments) -> Loss`. Unreduced losses of layers are averaged and added.

    Scores are made for `chunk` tokens at a time, never for all of them: memory is linear in T without the vocabulary.
    """

    def __init__(self, model: SequenceModelLayer, chunk: int = 1024):
        super().__init__()
        self.model = model
        self.chunk = chunk

    def forward(self, ids: Tensor, targets: Tensor, segments: Tensor | None = None, state: Any = None) -> Loss:
        hidden, state, aux = self.model.encode(ids, state=state, info=Info(segments=segments))
        asked = targets != IGNORE
        nats = linear_cross_entropy(hidden.flatten(0, 1), self.model.head.weight, targets.flatten(), self.chunk)
        count = asked.sum()
        extra = sum((value.mean() for name, value in aux.items() if name.endswith("loss")), torch.zeros((), device=ids.device))
        return Loss(nats / count.clamp(min=1) + extra, nats.detach(), count, state)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Sum of -log softmax(hidden weight')[targets] in nats, over targets other than IGNORE, in float32 or wider.

    Shapes: hidden [N, D], weight [V, D], targets [N]. Gradients are made along with the loss, `chunk` rows at a time, so
    that the [N, V] scores never exist.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wants = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants else None
        table = weight.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
                keep = wanted != IGNORE
                index = torch.where(keep, wanted, 0)[:, None]
                scores = (rows @ table.T).to(wide)
                log_sum = scores.logsumexp(-1, keepdim=True)
                total += torch.where(keep, (log_sum - scores.gather(1, index))[:, 0], 0.0).sum()
                if wants:
                    slope = scores.sub_(log_sum).exp_().scatter_add_(1, index, torch.full_like(log_sum, -1.0))
                    slope = slope.mul_(keep[:, None]).to(hidden.dtype)
                    dhidden[start : start + chunk] = slope @ table
                    dweight += slope.T @ rows
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * slope.to(dhidden.dtype), (dweight * slope).to(ctx.weight_dtype), None, None

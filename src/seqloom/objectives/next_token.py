"""The next token: cross entropy of each token under the scores of the one before it, in nats."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqloom.core import BadInput, Info
from seqloom.models.heads import TokenHead
from seqloom.models.sequence import SequenceModelLayer

IGNORE = -100
MOST = 2**27  # scores that exist at a time, whatever the chunk


class Loss(NamedTuple):
    """total: what to minimise. nats: sum of cross entropies over `count` targets. state: of the model, for the next window."""

    total: Tensor
    nats: Tensor
    count: Tensor
    state: Any = None


class NextToken(nn.Module):
    """Wraps a language model: `objective(ids, targets, segments) -> Loss`. Unreduced losses of layers are averaged and added.

    total = nats / count + sum of the layers' losses, with `count` the number of targets of this call; or of a larger batch
    that it is a part of, with `share` the part's weight for the layers' losses: the totals of the parts then add up to that
    of the whole. Scores are made for `chunk` tokens at a time, never for all of them: memory is linear in T without the
    vocabulary.

    Shapes: ids, targets (IGNORE where nothing is asked), segments [B, T].
    """

    _no_split_modules = ["BlockLayer"]  # what sharding keeps whole

    def __init__(self, model: SequenceModelLayer, chunk: int = 1024):
        super().__init__()
        if not isinstance(model.spec.head, TokenHead):
            raise BadInput(f"next-token training needs a token_head, not {type(model.spec.head).__name__}")
        if not model.spec.stack.causal:
            raise BadInput("next-token training needs a causal model, and a mixer of this one sees the token that it should "
                           "predict; use causal mixers, or train on masked tokens")
        self.model = model
        self.chunk = chunk

    def forward(self, ids: Tensor, targets: Tensor, segments: Tensor | None = None, state: Any = None, *,
                count: Tensor | float | None = None, share: float = 1.0, keep_state: bool = True) -> Loss:
        hidden, state, aux = self.model.encode(ids, state=state, info=Info(segments=segments))
        nats = linear_cross_entropy(hidden.flatten(0, 1), self.model.head.weight, targets.flatten(), self.chunk)
        found = (targets != IGNORE).sum()
        total = nats / (found.clamp(min=1) if count is None else count) + share * added(aux, nats)
        return Loss(total, nats.detach(), found, state if keep_state else None)


def added(aux: dict[str, Tensor], like: Tensor) -> Tensor:
    """The layers' own losses (the entries of `aux` whose names end in "loss"), each averaged, summed."""
    return sum((value.mean() for name, value in aux.items() if name.endswith("loss")), torch.zeros_like(like))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Sum of -log softmax(hidden weight')[targets] in nats, over targets other than IGNORE, in float32 or wider.

    Shapes: hidden [N, D], weight [V, D], targets [N]. Gradients are made along with the loss, `chunk` rows at a time, so
    that the [N, V] scores never exist: two blocks of [chunk, V] do. Under autocast the products are in its dtype, softmax
    and sums are not.
    """
    chunk = max(min(chunk, MOST // weight.shape[0]), 1)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        table = weight.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
                keep = wanted != IGNORE
                index = torch.where(keep, wanted, 0)[:, None]
                scores = (rows @ table.T).to(wide)
                # log sum exp from the softmax, which the gradient needs anyway: its largest entry is at least 1 / V
                share = torch.softmax(scores, -1)
                log_sum = scores.amax(-1, keepdim=True) - share.amax(-1, keepdim=True).log()
                total += torch.where(keep, (log_sum - scores.gather(1, index))[:, 0], 0.0).sum()
                del scores  # as `share` below: before the next block comes into being
                if wants_hidden or wants_weight:
                    # selections: what stands at a row that is not asked, NaN included, moves nothing
                    slope = share.scatter_add_(1, index, torch.full_like(log_sum, -1.0)).masked_fill_(~keep[:, None], 0.0)
                    slope = slope.to(hidden.dtype)
                    del share
                    if wants_hidden:
                        dhidden[start : start + chunk] = slope @ table
                    if wants_weight:
                        rows = torch.where(keep[:, None], rows, 0.0)
                        if rows.dtype == wide:
                            dweight.addmm_(slope.T, rows)
                        else:
                            dweight += slope.T @ rows
                    del slope
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (None if dhidden is None else dhidden * slope.to(dhidden.dtype),
                None if dweight is None else (dweight * slope).to(ctx.weight_dtype), None, None)

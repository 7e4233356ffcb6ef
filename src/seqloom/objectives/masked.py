"""Masked tokens: some tokens are hidden, and a model that sees both sides says what they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqloom.core import BadInput, Info
from seqloom.models.heads import TokenHead
from seqloom.models.sequence import SequenceModelLayer
from seqloom.objectives.next_token import IGNORE, Loss, added, linear_cross_entropy


class MaskedToken(nn.Module):
    """Wraps a bidirectional model: `objective(ids, segments) -> Loss`, the mean cross entropy of the tokens that were chosen.

    A share `rate` of the real tokens is chosen, each on its own; of those, 80 % are replaced by `mask`, 10 % by a random
    token, and 10 % stay as they are, as in BERT. Draws are from torch's global generator.

    Shapes: ids, segments [B, T], segment 0 at padding. Raises: BadInput for a causal model, or one without token scores.
    """

    def __init__(self, model: SequenceModelLayer, *, mask: int, rate: float = 0.15, chunk: int = 1024):
        super().__init__()
        if model.spec.stack.causal:
            raise BadInput("masked-token training needs a model that sees both sides; all mixers of this one are causal")
        if not isinstance(model.spec.head, TokenHead):
            raise BadInput(f"masked-token training needs a token_head, not {type(model.spec.head).__name__}")
        if not 0 < rate < 1:
            raise BadInput(f"the share of masked tokens must be in (0, 1), not {rate:g}")
        if not 0 <= mask < model.spec.stem.vocab:
            raise BadInput(f"the mask token {mask} is not one of the {model.spec.stem.vocab} embeddings")
        self.model, self.mask, self.rate, self.chunk = model, mask, rate, chunk

    def hide(self, ids: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(ids with some replaced, targets with IGNORE at all others), both [B, T]."""
        chosen = torch.rand(ids.shape, device=ids.device) < self.rate
        if segments is not None:
            chosen &= segments != 0
        how = torch.rand(ids.shape, device=ids.device)
        other = torch.randint(self.model.spec.stem.vocab, ids.shape, device=ids.device)
        hidden = torch.where(how < 0.8, self.mask, torch.where(how < 0.9, other, ids))
        return torch.where(chosen, hidden, ids), torch.where(chosen, ids, IGNORE)

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Loss:
        ids, targets = self.hide(ids, segments)
        hidden, _, aux = self.model.encode(ids, info=Info(segments=segments))
        nats = linear_cross_entropy(hidden.flatten(0, 1), self.model.head.weight, targets.flatten(), self.chunk)
        count = (targets != IGNORE).sum()
        return Loss(nats / count.clamp(min=1) + added(aux, nats), nats.detach(), count)

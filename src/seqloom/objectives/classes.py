"""Classes: cross entropy of one label per sequence, or per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import Info
from seqloom.models.sequence import SequenceModelLayer
from seqloom.objectives.next_token import IGNORE, Loss, added


class Classification(nn.Module):
    """Wraps a model: `objective(ids, labels, segments) -> Loss`. A pooled_head answers once a row, a token_head at every token.

    Shapes: ids [B, T], labels [B] or [B, T] (IGNORE where nothing is asked), segments [B, T] with 0 at padding.
    """

    def __init__(self, model: SequenceModelLayer):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, labels: Tensor, segments: Tensor | None = None) -> Loss:
        output = self.model(ids, info=Info(segments=segments))
        if output.logits.shape[:-1] != labels.shape:
            raise ValueError(f"labels of shape {list(labels.shape)} for answers of shape {list(output.logits.shape[:-1])}")
        scores = output.logits.flatten(0, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        nats = F.cross_entropy(scores, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        count = (labels != IGNORE).sum()
        return Loss(nats / count.clamp(min=1) + added(output.aux, nats), nats.detach(), count, output.state)

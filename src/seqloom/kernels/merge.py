"""Merge of partial softmaxes: attention over parts of the keys, joined into attention over all of them.

Over disjoint sets of keys with outputs y_i and log-sum-exps L_i of their scores,

    L = log sum_i exp(L_i)      y = sum_i exp(L_i - L) y_i

is the attention over their union. The join is associative and commutative; a part that shows a query no key has
L_i = -inf and y_i = 0 and changes nothing. Ring attention, key-split decoding, and slots or memories beside a window
are merges. Source: [flashattention-2] section 3.1 (method sheet, point 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys: the output, and the log-sum-exp of the scores (None where a form has none)."""

    y: Float[Tensor, "b t h v"]
    lse: Float[Tensor, "b t h"] | None = None


def merge(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint key sets, from the attention over each.

    Shapes: y [B, T, H, V] and lse [B, T, H] (float32 or wider) in every part. Both results are differentiable, where
    no key is visible too: there y = 0 and lse = -inf.
    Raises: ValueError for no parts, or for a part without a log-sum-exp.
    """
    if not partials:
        raise ValueError("merge needs at least one (output, log-sum-exp) pair, found none")
    if any(part.lse is None for part in partials):
        raise ValueError("merge needs the log-sum-exp of every part; every form of softmax attention but 'fused' returns it")
    lse = torch.stack([part.lse for part in partials])
    # the maximum cancels from the result, so no gradient flows through it; where no part sees a key any finite value does
    top = lse.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = (lse - top).exp()
    total = weight.sum(0)
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    share = weight / safe
    y = torch.stack([share[i].unsqueeze(-1) * part.y for i, part in enumerate(partials)]).sum(0)
    return Partial(y.to(partials[0].y.dtype), torch.where(seen, top + safe.log(), -torch.inf))

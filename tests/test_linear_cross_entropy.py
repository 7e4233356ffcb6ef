"""The loss of a large vocabulary without its scores: how much exists at a time, and the models that transformers sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from seqloom import hub
from seqloom.hub import modeling
from seqloom.mixers import MIXERS
from seqloom.models import Block, Stack
from seqloom.models.sequence import language_model
from seqloom.objectives import linear_cross_entropy, next_token

VOCAB = 60


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an operation makes inside."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return found


@pytest.mark.parametrize(("chunk", "most"), [(8, 2**27), (1024, 8 * 500)])
def test_no_more_than_a_block_of_scores_exists(chunk, most, monkeypatch):
    monkeypatch.setattr(next_token, "MOST", most)
    hidden, weight = torch.randn(200, 4).requires_grad_(), torch.randn(500, 4).requires_grad_()
    targets = torch.randint(500, (200,))
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk).backward()
    assert seen.entries == 8 * 500
    want = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), (hidden, weight))
    for got, right in zip((hidden.grad, weight.grad), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def model(causal: bool = True) -> nn.Module:
    mixer = MIXERS["linear"](heads=2, direction="causal" if causal else "bidirectional")
    return hub.wrap(language_model(vocab=VOCAB, stack=Stack(dim=8, blocks=(Block(mixer=mixer),))).build()).double()


def both(wrapped: nn.Module, ids: torch.Tensor, labels: torch.Tensor, **options):
    """(loss, gradients) with and without scores."""
    for skip in (False, True):
        wrapped.zero_grad()
        out = wrapped(ids, labels=labels, skip_logits=skip, **options)
        assert (out.logits is None) == skip
        out.loss.backward()
        yield out.loss.detach(), *(p.grad.clone() for p in wrapped.parameters())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(9)}])
def test_models_of_transformers_make_the_same_loss_without_scores(causal, options):
    ids = torch.randint(1, VOCAB, (2, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    kept, skipped = both(model(causal), ids, labels, attention_mask=(ids > 5).long(), **options)
    for got, want in zip(skipped, kept, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # transformers makes its loss in float32


def test_labels_that_are_already_shifted_stay_where_they_are():
    ids = torch.randint(VOCAB, (2, 9))
    kept, skipped = both(model(), ids, ids, shift_labels=ids.roll(-1, 1))
    torch.testing.assert_close(skipped[0], kept[0], rtol=1e-6, atol=1e-7)


def test_scores_are_left_out_in_training_where_they_are_large(monkeypatch):
    ids, wrapped = torch.randint(VOCAB, (2, 9)), model()
    assert wrapped.train()(ids, labels=ids).logits is not None
    monkeypatch.setattr(modeling, "LARGE", 18 * VOCAB)
    assert wrapped(ids, labels=ids).logits is None
    assert wrapped(ids).logits is not None
    assert wrapped.eval()(ids, labels=ids).logits is not None
    wrapped.train().skip_logits = False
    assert wrapped(ids, labels=ids).logits is not None


def test_what_needs_scores_gets_them():
    ids, wrapped = torch.randint(VOCAB, (2, 9)), model()
    wrapped.loss_function = lambda logits, labels, **_: logits.square().mean()
    assert wrapped(ids, labels=ids, skip_logits=True).logits is not None
    wrapped = model()
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)  # as an adapter wraps it
    assert wrapped(ids, labels=ids, skip_logits=True).logits is not None
    with pytest.raises(ValueError):  # fewer scores than labels, as with scores
        model()(ids, labels=ids, logits_to_keep=3, skip_logits=True)

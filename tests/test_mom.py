"""Mixtures of memories: what the laws and the recipe's checks do not say (the router, boundaries, errors)."""

from __future__ import annotations

import pytest
import torch

from seqloom.core import BuildContext, Info
from seqloom.core.marks import cast
from seqloom.laws.exact import memories
from seqloom.mixers import MixtureOfMemories
from seqloom.mixers.mom import MixtureOfMemoriesLayer
from seqloom.parts.router import TopKRouter, balance

DIM = 24


def layer(**settings) -> MixtureOfMemoriesLayer:
    return MixtureOfMemories(heads=2, **settings).build(BuildContext(dim=DIM)).double()


@pytest.mark.parametrize("active", [1, 2, 3])
def test_shares_are_of_the_most_probable_and_sum_to_one(active):
    router, x = TopKRouter(DIM, 3, active).double(), torch.randn(2, 9, DIM, dtype=torch.float64)
    weight, chosen, p = router(x)
    assert (chosen.sum(-1) == active).all() and ((weight > 0) == chosen).all()
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 9, dtype=torch.float64))
    least = torch.where(chosen, p, 2.0).amin(-1)
    assert (torch.where(chosen, 0.0, p).amax(-1) <= least).all()


def test_routing_is_the_same_in_every_precision_and_a_step_at_a_time():
    # away from ties, on inputs that bfloat16 can hold
    router = TopKRouter(DIM, 4, 2)
    x = (30 * torch.randn(2, 40, DIM)).to(torch.bfloat16)
    want = router.double()(x.double())
    top = want.probability.sort(-1, descending=True).values
    clear = top[..., 1] - top[..., 2] > 1e-4
    assert clear.sum() > 60
    low = cast(TopKRouter(DIM, 4, 2), torch.bfloat16)
    assert low.weight.dtype == torch.float32
    low.weight.data = router.weight.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = low(x)
    assert got.weight.dtype == torch.float32 and torch.equal(got.chosen[clear], want.chosen[clear])
    steps = torch.cat([low(x[:, t : t + 1]).chosen for t in range(40)], 1)
    assert torch.equal(steps[clear], want.chosen[clear])


def test_pads_do_not_count_in_the_balance():
    mixer, x = layer(), torch.randn(2, 12, DIM, dtype=torch.float64)
    ids = torch.ones(2, 12, dtype=torch.int64)
    ids[:, 8:] = 0
    padded, bare = mixer(x, info=Info(segments=ids)).aux, mixer(x[:, :8]).aux
    for name in ("balance_loss", "load"):
        torch.testing.assert_close(padded[name], bare[name])
    torch.testing.assert_close(bare["load"].sum(), torch.tensor(2.0, dtype=torch.float64))
    none = mixer(x, info=Info(segments=0 * ids)).aux
    assert none["balance_loss"].isfinite().all() and (none["load"] == 0).all()
    torch.testing.assert_close(bare["balance_loss"], 0.01 * balance(mixer.router(x[:, :8]))[0])


def test_a_boundary_resets_memories_that_its_first_token_does_not_choose():
    mixer, x = layer(shared=False, active=1), torch.randn(1, 12, DIM, dtype=torch.float64)
    ids = torch.tensor([[1] * 6 + [2] * 6])
    assert len(set(mixer.router(x).chosen[0, 6:].int().argmax(-1).tolist())) > 1
    torch.testing.assert_close(mixer(x, info=Info(segments=ids)).y[:, 6:], mixer(x[:, 6:]).y)


def test_a_mistake_in_the_rows_is_seen(monkeypatch):
    rows = MixtureOfMemoriesLayer._rows

    def all_take_all(self, routing, segments):
        return rows(self, routing._replace(chosen=torch.ones_like(routing.chosen)), segments)

    spec = MixtureOfMemories(heads=2)
    assert memories.is_loop(spec, tokens=20) < 1e-10 and memories.untouched(tokens=4) == 0
    monkeypatch.setattr(MixtureOfMemoriesLayer, "_rows", all_take_all)
    assert memories.is_loop(spec, tokens=20) > 1e-3 and memories.untouched(tokens=4) > 1e-3


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="1 to 4 of 4 memories"):
        MixtureOfMemories(heads=2, active=5)
    with pytest.raises(ValueError, match="does not split over"):
        MixtureOfMemories(heads=5).build(BuildContext(dim=DIM))

"""Gated slots, and slots beside a window: settings that cannot be are refused, and what holds beyond the laws."""

from __future__ import annotations

import pytest
import torch

from seqloom.core import BuildContext, Info, use_form
from seqloom.laws.exact import slots
from seqloom.mixers import GatedSlotAttention, NativeHybridAttention
from seqloom.mixers.gated_slot import FORMS, Slots


@pytest.mark.parametrize("settings", [dict(heads=4, kv_heads=3), dict(heads=2, slots=0), dict(heads=2, tau=0.0)])
@pytest.mark.parametrize("spec", [GatedSlotAttention, NativeHybridAttention])
def test_settings_that_cannot_be_are_refused(spec, settings):
    with pytest.raises(ValueError, match=spec.__name__):
        spec(**settings)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="a window of -1 tokens; use 0"):
        NativeHybridAttention(heads=2, window=-1)


def test_queries_that_share_no_slots_evenly_are_refused():
    q, k, gate = torch.randn(1, 3, 4, 2), torch.randn(1, 3, 3, 2), -torch.rand(1, 3, 3, 5)
    with pytest.raises(ValueError, match="4 query heads do not share 3 sets of slots"):
        FORMS["chunked"](q, k, k, gate, state=Slots(torch.zeros(1, 3, 2, 5), torch.zeros(1, 3, 5, 2)))


@pytest.mark.parametrize("window", [1, 4, 64])
def test_a_window_over_pads_and_short_segments(window):
    """Segments shorter and longer than the window, pads between: as each alone."""
    layer = NativeHybridAttention(heads=2, slots=4, window=window).build(BuildContext(dim=8)).double()
    x = torch.randn(1, 80, 8, dtype=torch.float64)
    ids = torch.tensor([[1] * 3 + [0] * 2 + [1] * 2 + [2] * 70 + [3] * 3])
    for form in ("recurrent", "chunked", "parallel"):
        with use_form(form), torch.no_grad():
            y, state, _ = layer(x, info=Info(segments=ids))
            for name in (1, 2, 3):
                mine = ids[0] == name
                alone = layer(x[:, mine])
                torch.testing.assert_close(y[:, mine], alone.y, rtol=1e-10, atol=1e-10)
            for got, want in zip((*state.cells.slots, *state.cells.ring), (*alone.state.cells.slots, *alone.state.cells.ring),
                                 strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_memory_of_training_is_linear():
    def kept(spec, tokens):
        layer, sizes = spec.build(BuildContext(dim=16)), {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            layer(torch.randn(1, tokens, 16))
        return sum(sizes.values())

    for spec in (GatedSlotAttention(heads=2, slots=8), NativeHybridAttention(heads=2, slots=8, window=16)):
        assert kept(spec, 2048) <= 2.05 * kept(spec, 1024)


def test_a_slot_late_or_early_is_seen():
    assert slots.off_by_one() > 1e-4 and slots.first_axis(axis="key") > 1e-3 and slots.first_axis() < 1e-10

"""Gated slots beside an independent implementation: flash-linear-attention's naive loop, float32 on the CPU."""

import warnings

import pytest
import torch

from seqloom.core import runnable
from seqloom.mixers import gated_slot
from seqloom.mixers.gated_slot import Slots

pytestmark = pytest.mark.peer

B, T, H, G, K, V, M = 2, 70, 4, 2, 8, 6, 5


@pytest.mark.parametrize("form", runnable(gated_slot.FORMS, "cpu"))
@pytest.mark.parametrize("tau", [1.0, 8.0])
def test_gated_slots_that_heads_share(form, tau):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
        naive = pytest.importorskip("fla.ops.gsa.naive")
    q, k, v = (torch.randn(B, T, heads, width) for heads, width in ((H, K), (G, K), (G, V)))
    log_a = torch.nn.functional.logsigmoid(torch.randn(B, T, G, M)) / tau
    state = Slots(torch.randn(B, G, K, M), torch.randn(B, G, M, V))
    got = gated_slot.FORMS[form](q, k, v, log_a, state=state, scale=0.5)
    y, (keys, values) = naive.naive_recurrent_gsa(q, k, v, -log_a.expm1(), log_a, scale=0.5, initial_state=state,
                                                  output_final_state=True)
    for mine, theirs in ((got.y, y), (got.state.keys, keys), (got.state.values, values)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)

"""The GRU beside torch.nn.GRU: same weights, same outputs, last state and gradients."""

import pytest
import torch

from seqloom.core import BuildContext, Info, use_form
from seqloom.mixers import GRU

pytestmark = pytest.mark.peer


@pytest.fixture
def pair():
    torch.manual_seed(0)
    layer = GRU().build(BuildContext(dim=12))
    peer = torch.nn.GRU(12, 12, batch_first=True)
    peer.load_state_dict({f"{name}_l0": value for name, value in layer.state_dict().items()})
    return layer, peer


@pytest.mark.parametrize("form", ["recurrent", "fused"])
def test_outputs_state_and_gradients(pair, form):
    layer, peer = pair
    x = torch.randn(3, 40, 12)
    with use_form(form):
        y, state, _ = layer(x)
    want, last = peer(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.cells.hidden, last[0], rtol=1e-5, atol=1e-5)
    way = torch.randn_like(y)
    (y * way).sum().backward()
    (want * way).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, getattr(peer, f"{name}_l0").grad, rtol=1e-4, atol=1e-4)


def test_packed_rows_are_the_peer_on_each(pair):
    layer, peer = pair
    x = torch.randn(1, 20, 12)
    ids = torch.tensor([[0] * 2 + [1] * 7 + [0] + [2] * 10])
    y = layer(x, info=Info(segments=ids)).y
    for start, stop in ((2, 9), (10, 20)):
        torch.testing.assert_close(y[:, start:stop], peer(x[:, start:stop])[0], rtol=1e-5, atol=1e-5)

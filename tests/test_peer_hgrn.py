"""HGRN's real recurrence beside flash-linear-attention's naive function, which runs on a CPU in float32.

Skipped, and said to be, where the package is not installed: `pip install flash-linear-attention`. Its naive chunked function
groups tokens along the wrong axis and is no oracle.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F

from seqloom.core import BuildContext, runnable, use_form
from seqloom.mixers import HGRN

pytestmark = pytest.mark.peer
B, T, D = 2, 70, 16


def naive():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
        return pytest.importorskip("fla.ops.hgrn.naive").naive_recurrent_hgrn


@pytest.mark.parametrize("form", runnable(HGRN(recurrence="real").forms, "cpu"))
@pytest.mark.parametrize("index", [0, 2])
def test_layer_with_its_bounds(form, index):
    """The whole layer: forget gates in log space with the bounds summed as the peer's model sums them, and its gated norm."""
    recurrence, (depth, make) = naive(), (4, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    ctx = BuildContext(dim=D, layer=index, depth=depth)
    layer = HGRN(recurrence="real", norm="rms", bias=False, lower_bounds="shifted").build(ctx)
    logits = next(ctx.store.parameters())
    with torch.no_grad():
        logits.copy_(torch.randn(depth, D, generator=make))
    x = torch.randn(B, T, D, generator=make)
    with torch.no_grad(), use_form(form):
        got = layer(x).y
    share = logits.detach().softmax(0)
    bound = (share.cumsum(0) - share[0])[index]
    f = F.logsigmoid(layer.f_proj(x))
    if index:
        f = torch.logaddexp(bound.log(), torch.log1p(-bound) + f)
    h, _ = recurrence(F.silu(layer.i_proj(x)) * (1 - f.exp()), f)
    want = layer.o_proj(F.rms_norm(h, (D,), layer.g_norm.weight, layer.g_norm.eps) * F.silu(layer.g_proj(x)))
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-4)

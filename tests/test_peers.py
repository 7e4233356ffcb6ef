"""Kernels beside independent implementations: flash-linear-attention's naive functions, which run on a CPU in float32.

They are skipped, and said to be, where the package is not installed: `pip install flash-linear-attention`.
"""

import math
import warnings

import pytest
import torch

from seqloom.kernels import decay_scan, delta_scan

pytestmark = pytest.mark.peer

B, T, H, K, V = 2, 70, 3, 8, 6
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def naive(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
        return pytest.importorskip(f"fla.ops.{module}.naive")


@pytest.fixture
def streams():
    make = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    return {
        "q": rand(B, T, H, K),
        "k": unit(rand(B, T, H, K)),
        "v": rand(B, T, H, V),
        "beta": rand(B, T, H).sigmoid(),
        "head": torch.nn.functional.logsigmoid(rand(B, T, H)),
        "channel": torch.nn.functional.logsigmoid(rand(B, T, H, K)),
        "state": rand(B, H, K, V),
    }


def swap(*tensors):
    """[B, T, H, ...] <-> [B, H, T, ...]"""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def test_delta_rule(streams):
    q, k, v, beta = (streams[name] for name in ("q", "k", "v", "beta"))
    got = delta_scan.chunked(q / math.sqrt(K), k, v, beta, state=streams["state"].clone())
    want, state = naive("delta_rule").delta_rule_recurrence(*swap(q, k, v, beta), initial_state=streams["state"].clone())
    torch.testing.assert_close(got.y, swap(want)[0], **TOLERANCE)
    torch.testing.assert_close(got.state, state, **TOLERANCE)


def test_gated_delta_rule(streams):
    q, k, v, beta, g = (streams[name] for name in ("q", "k", "v", "beta", "head"))
    got = delta_scan.chunked(q / math.sqrt(K), k, v, beta, g, state=streams["state"].clone())
    want, state = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(
        q=q, k=k, v=v, beta=beta, g=g, initial_state=streams["state"].clone(), output_final_state=True
    )
    torch.testing.assert_close(got.y, want, **TOLERANCE)
    torch.testing.assert_close(got.state, state, **TOLERANCE)


def test_gated_linear_attention(streams):
    q, k, v, g = (streams[name] for name in ("q", "k", "v", "channel"))
    got = decay_scan.chunked(q / math.sqrt(K), k, v, g, state=streams["state"].clone())
    want, state = naive("gla").naive_recurrent_gla(
        q=q, k=k, v=v, gk=g, initial_state=streams["state"].clone(), output_final_state=True
    )
    torch.testing.assert_close(got.y, want, **TOLERANCE)
    torch.testing.assert_close(got.state, state, **TOLERANCE)


def test_decay_per_head(streams):
    q, k, v, g = (streams[name] for name in ("q", "k", "v", "head"))
    got = decay_scan.chunked(q / math.sqrt(K), k, v, g, state=streams["state"].clone())
    want, state = naive("simple_gla").naive_recurrent_simple_gla(
        q=q, k=k, v=v, g=g, initial_state=streams["state"].clone(), output_final_state=True
    )
    torch.testing.assert_close(got.y, want, **TOLERANCE)
    torch.testing.assert_close(got.state, state, **TOLERANCE)


def test_retention(streams):
    q, k, v = streams["q"], streams["k"], streams["v"]
    log_a = torch.log1p(-(2.0 ** -(5 + torch.arange(H)))).expand(B, T, H)
    got = decay_scan.chunked(q / math.sqrt(K), k, v, log_a)
    torch.testing.assert_close(got.y, swap(naive("retention").naive_retention(*swap(q, k, v)))[0], **TOLERANCE)

"""DeltaProduct beside flash-linear-attention's naive function, which runs on a CPU in float32 (see test_peers.py)."""

import math

import pytest
import torch
from test_peers import TOLERANCE, naive

from seqloom.kernels import delta_scan

pytestmark = pytest.mark.peer

B, T, N, H, K, V = 2, 40, 3, 2, 8, 6


@pytest.mark.parametrize("decay", [False, True])
def test_gated_delta_product(decay):
    make = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    q, k, v = rand(B, T, H, K), torch.nn.functional.normalize(rand(B, T, N, H, K), dim=-1), rand(B, T, N, H, V)
    beta, log_a = 2 * rand(B, T, N, H).sigmoid(), torch.nn.functional.logsigmoid(rand(B, T, H)) if decay else None
    state = rand(B, H, K, V)
    got = delta_scan.chunked(q / math.sqrt(K), k, v, beta, log_a, state=state.clone())
    want, new = naive("gated_delta_product").naive_recurrent_gated_delta_product(
        q / math.sqrt(K), *(x.flatten(1, 2) for x in (k, v)), log_a, beta.flatten(1, 2), scale=1.0, cu_seqlens=None,
        initial_state=state.clone(), output_final_state=True, num_householder=N,
    )
    torch.testing.assert_close(got.y, want, **TOLERANCE)
    torch.testing.assert_close(got.state, new, **TOLERANCE)

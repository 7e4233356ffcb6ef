"""Mamba-2: one projection [z, x, B, C, dt], a convolution over (x, B, C), a scalar decay per head, the gate before the norm."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, rms_norm, short_conv, silu, softplus, write

N, P, WIDTH = 3, 8, 4
INNER = 2 * DIM
HEADS = INNER // P
rand = draw(8)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_in, w_out = rand(2 * INNER + 2 * N + HEADS, DIM), rand(DIM, INNER)
taps, bias = rand(INNER + 2 * N, WIDTH), rand(INNER + 2 * N)
a_log, dt_bias, skip, scale = rand(HEADS), rand(HEADS), rand(HEADS), 1 + rand(INNER)

y = np.zeros_like(x)
for b in range(BATCH):
    z, xbc, dt = np.split(x[b] @ w_in.T, [INNER, 2 * INNER + 2 * N], axis=1)
    xbc = silu(short_conv(xbc, taps, bias))
    inner, B, C = np.split(xbc, [INNER, INNER + N], axis=1)
    dt = softplus(dt + dt_bias)
    out = np.zeros((TOKENS, INNER))
    for h in range(HEADS):
        rows = slice(h * P, (h + 1) * P)
        state = np.zeros((P, N))
        for t in range(TOKENS):
            state = np.exp(-dt[t, h] * np.exp(a_log[h])) * state + dt[t, h] * np.outer(inner[t, rows], B[t])
            out[t, rows] = state @ C[t] + skip[h] * inner[t, rows]
    y[b] = rms_norm(out * silu(z), scale, 1e-5) @ w_out.T
write(
    "mamba2",
    dict(state=N, head_dim=P, conv=WIDTH),
    x,
    y,
    {
        "in_proj.weight": w_in,
        "conv1d.weight": taps,
        "conv1d.bias": bias,
        "dt_bias": dt_bias,
        "A_log": a_log,
        "D": skip,
        "norm.weight": scale,
        "out_proj.weight": w_out,
    },
)

"""Mamba: the selective recurrence of [mamba] Algorithm 2 for every channel, Euler's rule for the input."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, short_conv, silu, softplus, write

N, WIDTH, RANK = 3, 4, 2
E = 2 * DIM
rand = draw(9)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_in, w_out, w_x = rand(2 * E, DIM), rand(DIM, E), rand(RANK + 2 * N, E)
taps, bias, w_dt, b_dt = rand(E, WIDTH), rand(E), rand(E, RANK), rand(E)
a_log, skip = rand(E, N), rand(E)

y = np.zeros_like(x)
for b in range(BATCH):
    inner, z = np.split(x[b] @ w_in.T, 2, axis=1)
    inner = silu(short_conv(inner, taps, bias))
    out = np.zeros((TOKENS, E))
    state = np.zeros((E, N))
    for t in range(TOKENS):
        delta, B, C = np.split(w_x @ inner[t], [RANK, RANK + N])
        dt = softplus(w_dt @ delta + b_dt)
        for e in range(E):
            for n in range(N):
                state[e, n] = np.exp(-dt[e] * np.exp(a_log[e, n])) * state[e, n] + dt[e] * B[n] * inner[t, e]
            out[t, e] = state[e] @ C + skip[e] * inner[t, e]
    y[b] = (out * silu(z)) @ w_out.T
write(
    "mamba",
    dict(state=N, conv=WIDTH, dt_rank=RANK),
    x,
    y,
    {
        "in_proj.weight": w_in,
        "conv1d.weight": taps,
        "conv1d.bias": bias,
        "x_proj.weight": w_x,
        "dt_proj.weight": w_dt,
        "dt_proj.bias": b_dt,
        "A_log": a_log,
        "D": skip,
        "out_proj.weight": w_out,
    },
)

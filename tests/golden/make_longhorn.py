"""Longhorn: the diagonal update of [longhorn] Method 3, channel by channel and state by state, and the rest of its layer."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, short_conv, sigmoid, silu, write

N, WIDTH, RANK = 3, 4, 2
E = 2 * DIM
rand = draw(12)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_in, w_out, w_x = rand(2 * E, DIM), rand(DIM, E), rand(RANK + 2 * N, E)
taps, bias, w_dt, b_dt, skip = rand(E, WIDTH), rand(E), rand(E, RANK), rand(E), rand(E)

y = np.zeros_like(x)
for b in range(BATCH):
    inner, z = np.split(x[b] @ w_in.T, 2, axis=1)
    inner = silu(short_conv(inner, taps, bias))
    out = np.zeros((TOKENS, E))
    state = np.zeros((E, N))
    for t in range(TOKENS):
        delta, key, query = np.split(w_x @ inner[t], [RANK, RANK + N])
        beta = sigmoid(w_dt @ delta + b_dt)
        for e in range(E):
            step = beta[e] / (1 + beta[e] * (key @ key))
            for n in range(N):
                state[e, n] = (1 - step * key[n] ** 2) * state[e, n] + step * inner[t, e] * key[n]
            out[t, e] = state[e] @ query + skip[e] * inner[t, e]
    y[b] = (out * silu(z)) @ w_out.T
write(
    "longhorn",
    dict(state=N, conv=WIDTH, dt_rank=RANK),
    x,
    y,
    {
        "in_proj.weight": w_in,
        "conv1d.weight": taps,
        "conv1d.bias": bias,
        "x_proj.weight": w_x,
        "dt_head.weight": w_dt,
        "dt_head.bias": b_dt,
        "D": skip,
        "out_proj.weight": w_out,
    },
)

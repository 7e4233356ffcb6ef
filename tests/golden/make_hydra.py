"""Hydra: an explicit quasiseparable matrix per head, a centred convolution, a diagonal from the token, gate after the norm."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, rms_norm, silu, softplus, write

N, P, WIDTH = 3, 8, 5
INNER = 2 * DIM
HEADS = INNER // P
rand = draw(11)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_in, w_out, w_d = rand(2 * INNER + 4 * N + 2 * HEADS, DIM), rand(DIM, INNER), rand(HEADS, INNER)
taps, bias = rand(INNER + 4 * N, WIDTH), rand(INNER + 4 * N)
a_log, dt_bias, skip, scale = rand(HEADS), rand(HEADS), rand(HEADS), 1 + rand(INNER)

y = np.zeros_like(x)
for b in range(BATCH):
    z, mixed, dt = np.split(x[b] @ w_in.T, [INNER, 2 * INNER + 4 * N], axis=1)
    seen = np.zeros_like(mixed)
    for t in range(TOKENS):
        for j in range(WIDTH):
            s = t + j - WIDTH // 2
            if 0 <= s < TOKENS:
                seen[t] += taps[:, j] * mixed[s]
    seen = silu(seen + bias)
    inner, B1, C1, B2, C2 = np.split(seen, np.cumsum([INNER, N, N, N]), axis=1)
    step1, step2 = softplus(dt[:, :HEADS] + dt_bias), softplus(dt[:, HEADS:] + dt_bias)
    a1, a2 = np.exp(-np.exp(a_log) * step1), np.exp(-np.exp(a_log) * step2)
    own = inner @ w_d.T + skip
    out = np.zeros((TOKENS, INNER))
    for h in range(HEADS):
        rows = slice(h * P, (h + 1) * P)
        for i in range(TOKENS):
            for j in range(TOKENS):
                if j < i:  # what the token before i reads of j
                    m = C1[i - 1] @ B1[j] * step1[j, h] * np.prod(a1[j + 1 : i, h])
                elif j > i:
                    m = C2[i + 1] @ B2[j] * step2[j, h] * np.prod(a2[i + 1 : j, h])
                else:
                    m = own[i, h]
                out[i, rows] += m * inner[j, rows]
    y[b] = (rms_norm(out, scale, 1e-5) * silu(z)) @ w_out.T
write(
    "hydra",
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
        "fc_D.weight": w_d,
        "norm.weight": scale,
        "out_proj.weight": w_out,
    },
)

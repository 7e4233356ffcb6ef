"""Differential Mamba, layer 0: two Mamba-2 of the model's width, one taken from the other, the difference normed."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, rms_norm, short_conv, sigmoid, silu, softplus, write

N, P, WIDTH = 3, 6, 4
HEADS = DIM // P
LAMBDA_INIT = 0.2
rand = draw(21)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
parameters = {"lambda_q1": rand(DIM, scale=0.3), "subln.weight": 1 + rand(DIM)}


def mamba2(u, p):
    z, xbc, dt = np.split(u @ p["in_proj.weight"].T, [DIM, 2 * DIM + 2 * N], axis=1)
    xbc = silu(short_conv(xbc, p["conv1d.weight"], p["conv1d.bias"]))
    dt = softplus(dt + p["dt_bias"])
    out = np.zeros((TOKENS, DIM))
    for h in range(HEADS):
        state = np.zeros((P, N))
        for t in range(TOKENS):
            value, B, C = xbc[t, h * P : (h + 1) * P], xbc[t, DIM : DIM + N], xbc[t, DIM + N :]
            state = np.exp(-dt[t, h] * np.exp(p["A_log"][h])) * state + np.outer(dt[t, h] * value, B)
            out[t, h * P : (h + 1) * P] = state @ C + p["D"][h] * value
    return rms_norm(out * silu(z), p["norm.weight"], 1e-5) @ p["out_proj.weight"].T


mixers = []
for _ in range(2):
    mixers.append({
        "in_proj.weight": rand(2 * DIM + 2 * N + HEADS, DIM),
        "conv1d.weight": rand(DIM + 2 * N, WIDTH),
        "conv1d.bias": rand(DIM + 2 * N),
        "dt_bias": rand(HEADS),
        "A_log": rand(HEADS),
        "D": rand(HEADS),
        "norm.weight": 1 + rand(DIM),
        "out_proj.weight": rand(DIM, DIM),
    })
    parameters |= {f"mixer_{len(mixers)}.{name}": value for name, value in mixers[-1].items()}

strength = sigmoid(parameters["lambda_q1"].sum()) + LAMBDA_INIT
y = np.zeros_like(x)
for b in range(BATCH):
    difference = mamba2(x[b], mixers[0]) - strength * mamba2(x[b], mixers[1])
    y[b] = (1 - LAMBDA_INIT) * rms_norm(difference, parameters["subln.weight"], 1e-5)
write("diff_mamba", dict(mixer=dict(kind="mamba2", state=N, head_dim=P, expand=1, conv=WIDTH)), x, y, parameters)

"""Gated linear attention: every key channel of the state decays by its own gate, sigmoid(.)^(1/16)."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, rms_norm, sigmoid, silu, write

HEADS, K, V, RANK, TAU = 2, 3, 4, 5, 16.0
rand = draw(7)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_q, w_k, w_v, w_g = rand(HEADS * K, DIM), rand(HEADS * K, DIM), rand(HEADS * V, DIM), rand(HEADS * V, DIM)
w_o, scale = rand(DIM, HEADS * V), 1 + rand(V)
down, up, bias = rand(RANK, DIM), rand(HEADS * K, RANK), rand(HEADS * K)

y = np.zeros_like(x)
for b in range(BATCH):
    for h in range(HEADS):
        rows = slice(h * K, (h + 1) * K)
        state = np.zeros((K, V))
        for t in range(TOKENS):
            u = x[b, t]
            decay = sigmoid((up @ (down @ u) + bias)[rows]) ** (1 / TAU)
            state = decay[:, None] * state + np.outer((w_k @ u)[rows], (w_v @ u)[h * V : (h + 1) * V])
            out = rms_norm(state.T @ (w_q @ u)[rows] / np.sqrt(K), scale, 1e-6) * silu((w_g @ u)[h * V : (h + 1) * V])
            y[b, t] += w_o[:, h * V : (h + 1) * V] @ out
write(
    "gated_linear",
    dict(heads=HEADS, key_dim=K, value_dim=V, gate_rank=RANK, tau=TAU),
    x,
    y,
    {
        "qkv.weight": np.concatenate([w_q, w_k, w_v]),
        "a_proj.0.weight": down,
        "a_proj.1.weight": up,
        "a_proj.1.bias": bias,
        "g_proj.weight": w_g,
        "o_norm.weight": scale,
        "o_proj.weight": w_o,
    },
)

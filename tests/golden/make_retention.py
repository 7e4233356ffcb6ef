"""Retention in its parallel form: q and k turned by their positions, weights gamma^(t - s), a gated norm per head."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, rms_norm, silu, write

HEADS, K, V = 3, 4, 5
rand = draw(6)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_q, w_k, w_v, w_g = rand(HEADS * K, DIM), rand(HEADS * K, DIM), rand(HEADS * V, DIM), rand(HEADS * V, DIM)
w_o, scale = rand(DIM, HEADS * V), 1 + rand(V)


def turn(u, t):
    """Channels i and i + K/2 as a complex number, times exp(i t 10000^(-2i/K))."""
    z = (u[: K // 2] + 1j * u[K // 2 :]) * np.exp(1j * t * 10000.0 ** (-2 * np.arange(K // 2) / K))
    return np.concatenate([z.real, z.imag])


y = np.zeros_like(x)
for b in range(BATCH):
    for t in range(TOKENS):
        for h in range(HEADS):
            gamma = 1 - 2.0 ** (-5 - h)
            q = turn((w_q @ x[b, t])[h * K : (h + 1) * K], t) / np.sqrt(K)
            out = np.zeros(V)
            for s in range(t + 1):
                k = turn((w_k @ x[b, s])[h * K : (h + 1) * K], s)
                out += gamma ** (t - s) * (q @ k) * (w_v @ x[b, s])[h * V : (h + 1) * V]
            out = rms_norm(out, scale, 1e-6) * silu((w_g @ x[b, t])[h * V : (h + 1) * V])
            y[b, t] += w_o[:, h * V : (h + 1) * V] @ out
write(
    "retention",
    dict(heads=HEADS, key_dim=K, value_dim=V),
    x,
    y,
    {
        "qkv.weight": np.concatenate([w_q, w_k, w_v]),
        "g_proj.weight": w_g,
        "o_norm.weight": scale,
        "o_proj.weight": w_o,
    },
)

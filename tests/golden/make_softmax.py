"""Softmax attention with rotary positions and grouped keys: attention equations, one query at a time."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, write

HEADS, GROUPS, K, WINDOW = 3, 1, 4, 5
rand = draw(1)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_q, w_k, w_v, w_o = rand(HEADS * K, DIM), rand(GROUPS * K, DIM), rand(GROUPS * K, DIM), rand(DIM, HEADS * K)


def rotate(u, t):
    """Pairs (i, i + K/2) turn by t 10000^(-2i/K)."""
    out = u.copy()
    for i in range(K // 2):
        angle = t * 10000.0 ** (-2 * i / K)
        a, b = u[i], u[i + K // 2]
        out[i] = a * np.cos(angle) - b * np.sin(angle)
        out[i + K // 2] = a * np.sin(angle) + b * np.cos(angle)
    return out


y = np.zeros_like(x)
for b in range(BATCH):
    for t in range(TOKENS):
        heads = []
        for h in range(HEADS):
            g = h * GROUPS // HEADS
            q = rotate((w_q @ x[b, t])[h * K : (h + 1) * K], t)
            scores, values = [], []
            for s in range(max(0, t - WINDOW + 1), t + 1):
                scores.append(q @ rotate((w_k @ x[b, s])[g * K : (g + 1) * K], s) / np.sqrt(K))
                values.append((w_v @ x[b, s])[g * K : (g + 1) * K])
            p = np.exp(np.array(scores) - max(scores))
            heads.append((p / p.sum()) @ np.array(values))
        y[b, t] = w_o @ np.concatenate(heads)
write(
    "softmax",
    dict(heads=HEADS, kv_heads=GROUPS, head_dim=K, window=WINDOW),
    x,
    y,
    {"qkv.weight": np.concatenate([w_q, w_k, w_v]), "out.weight": w_o},
)

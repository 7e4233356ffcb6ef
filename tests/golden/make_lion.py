"""LION-S with the key side's decays: masked attention over the whole sequence, entry by entry, rows divided by their sums."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, sigmoid, silu, write

HEADS = 2
K = DIM // HEADS
rand = draw(12)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_q, w_k, w_v, w_o = (rand(DIM, DIM) for _ in range(4))
w_a, b_a = rand(HEADS, DIM), rand(HEADS)


def phi(u):
    u = silu(u) + 0.5
    return u / np.sqrt((u * u).sum())


y = np.zeros_like(x)
for b in range(BATCH):
    decay = 1 - sigmoid(x[b] @ w_a.T + b_a)
    for i in range(TOKENS):
        heads = []
        for h in range(HEADS):
            rows = slice(h * K, (h + 1) * K)
            q = phi(w_q[rows] @ x[b, i])
            top, bottom = np.zeros(K), 0.0
            for j in range(TOKENS):
                between = decay[j:i, h] if j <= i else decay[i + 1 : j + 1, h]
                weight = q @ phi(w_k[rows] @ x[b, j]) / np.sqrt(K) * np.prod(between)
                top += weight * (w_v[rows] @ x[b, j])
                bottom += weight
            heads.append(top / (bottom + 1e-6))
        y[b, i] = w_o @ np.concatenate(heads)
write(
    "lion",
    dict(heads=HEADS, mask="selective", side="key"),
    x,
    y,
    {"qkv.weight": np.concatenate([w_q, w_k, w_v]), "a_proj.weight": w_a, "a_proj.bias": b_a, "out.weight": w_o},
)

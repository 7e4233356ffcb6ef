"""Linear attention with ELU + 1 features and its normaliser, as sums over the past."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, write

HEADS, K, V = 2, 3, 4
rand = draw(2)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_q, w_k, w_v, w_o = rand(HEADS * K, DIM), rand(HEADS * K, DIM), rand(HEADS * V, DIM), rand(DIM, HEADS * V)
phi = lambda u: np.where(u > 0, u + 1, np.exp(np.minimum(u, 0)))  # noqa: E731

y = np.zeros_like(x)
for b in range(BATCH):
    for t in range(TOKENS):
        heads = []
        for h in range(HEADS):
            q = phi((w_q @ x[b, t])[h * K : (h + 1) * K]) / np.sqrt(K)
            top, bottom = np.zeros(V), 1e-6
            for s in range(t + 1):
                weight = q @ phi((w_k @ x[b, s])[h * K : (h + 1) * K])
                top += weight * (w_v @ x[b, s])[h * V : (h + 1) * V]
                bottom += weight
            heads.append(top / bottom)
        y[b, t] = w_o @ np.concatenate(heads)
write(
    "linear",
    dict(heads=HEADS, key_dim=K, value_dim=V),
    x,
    y,
    {"qkv.weight": np.concatenate([w_q, w_k, w_v]), "out.weight": w_o},
)

"""Gated slot attention: slots of keys and of values as gated averages, read by a softmax; two queries share a set of slots."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, rms_norm, sigmoid, silu, write

HEADS, KV, K, V, SLOTS, TAU = 2, 1, 3, 4, 5, 8.0
rand = draw(11)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_q, w_k, w_v, w_f = rand(HEADS * K, DIM), rand(KV * K, DIM), rand(KV * V, DIM), rand(KV * SLOTS, DIM, scale=2.0)
w_o, scale = rand(DIM, HEADS * V), 1 + rand(HEADS * V)

y = np.zeros_like(x)
for b in range(BATCH):
    slot_k, slot_v = np.zeros((KV, SLOTS, K)), np.zeros((KV, SLOTS, V))
    for t in range(TOKENS):
        u, read = x[b, t], []
        q, k, v, f = silu(w_q @ u), silu(w_k @ u), silu(w_v @ u), sigmoid(w_f @ u) ** (1 / TAU)
        for g in range(KV):
            for m in range(SLOTS):
                a = f[g * SLOTS + m]
                slot_k[g, m] = a * slot_k[g, m] + (1 - a) * k[g * K : (g + 1) * K]
                slot_v[g, m] = a * slot_v[g, m] + (1 - a) * v[g * V : (g + 1) * V]
        for h in range(HEADS):
            g = h // (HEADS // KV)
            weight = np.exp(slot_k[g] @ q[h * K : (h + 1) * K])
            read.append(slot_v[g].T @ (weight / weight.sum()))
        y[b, t] = w_o @ rms_norm(silu(np.concatenate(read)), scale, 1e-6)
write(
    "gated_slot",
    dict(heads=HEADS, kv_heads=KV, key_dim=K, value_dim=V, slots=SLOTS, tau=TAU),
    x,
    y,
    {
        "qkv.weight": np.concatenate([w_q, w_k, w_v]),
        "f_proj.weight": w_f,
        "o_norm.weight": scale,
        "o_proj.weight": w_o,
    },
)

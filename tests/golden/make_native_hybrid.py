"""Native hybrid attention: slots filled W tokens late and the last W tokens, one softmax; rotation inside the window only."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, sigmoid, write

HEADS, KV, K, V, SLOTS, WINDOW, TAU, THETA = 2, 1, 4, 3, 5, 3, 8.0, 10000.0
rand = draw(12)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_q, w_k, w_v, w_f = rand(HEADS * K, DIM), rand(KV * K, DIM), rand(KV * V, DIM), rand(KV * SLOTS, DIM, scale=2.0)
w_o = rand(DIM, HEADS * V)


def turn(vector, position):
    """Channels (i, i + K/2) turn by position * theta^(-2i/K)."""
    out = np.zeros(K)
    for i in range(K // 2):
        angle = position * THETA ** (-2 * i / K)
        out[i] = vector[i] * np.cos(angle) - vector[i + K // 2] * np.sin(angle)
        out[i + K // 2] = vector[i] * np.sin(angle) + vector[i + K // 2] * np.cos(angle)
    return out


y = np.zeros_like(x)
for b in range(BATCH):
    keys = [(w_k @ x[b, t]).reshape(KV, K) for t in range(TOKENS)]
    values = [(w_v @ x[b, t]).reshape(KV, V) for t in range(TOKENS)]
    gates = [sigmoid(w_f @ x[b, t]).reshape(KV, SLOTS) ** (1 / TAU) for t in range(TOKENS)]
    slot_k, slot_v = np.zeros((KV, SLOTS, K)), np.zeros((KV, SLOTS, V))
    for t in range(TOKENS):
        gone = t - WINDOW
        for g in range(KV if gone >= 0 else 0):
            for m in range(SLOTS):
                a = gates[gone][g, m]
                slot_k[g, m] = a * slot_k[g, m] + (1 - a) * keys[gone][g]
                slot_v[g, m] = a * slot_v[g, m] + (1 - a) * values[gone][g]
        for h in range(HEADS):
            g = h // (HEADS // KV)
            q = (w_q @ x[b, t])[h * K : (h + 1) * K]
            weight, seen = [], []
            for m in range(SLOTS if gone >= 0 else 0):
                weight.append(np.exp(q @ slot_k[g, m] / np.sqrt(K)))
                seen.append(slot_v[g, m])
            for s in range(max(gone + 1, 0), t + 1):
                weight.append(np.exp(turn(q, t) @ turn(keys[s][g], s) / np.sqrt(K)))
                seen.append(values[s][g])
            out = np.array(weight) @ np.array(seen) / np.sum(weight)
            y[b, t] += w_o[:, h * V : (h + 1) * V] @ out
write(
    "native_hybrid",
    dict(heads=HEADS, kv_heads=KV, key_dim=K, value_dim=V, slots=SLOTS, window=WINDOW, tau=TAU),
    x,
    y,
    {"qkv.weight": np.concatenate([w_q, w_k, w_v]), "f_proj.weight": w_f, "o_proj.weight": w_o},
)

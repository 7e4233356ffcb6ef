"""Mixture of memories: a loop over tokens and the memories each chooses, every memory with its own past."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, rms_norm, sigmoid, silu, softplus, unit, write

HEADS, K, V, WIDTH, EPS, MEMORIES, ACTIVE = 2, 3, 4, 4, 1e-5, 3, 2
ROWS = MEMORIES + 1  # the shared memory is the last

rand = draw(21)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
router, w_q = rand(MEMORIES, DIM), rand(HEADS * K, DIM)
w_k, w_v = rand(ROWS, HEADS * K, DIM), rand(ROWS, HEADS * V, DIM)
w_b, w_a = rand(ROWS, HEADS, DIM), rand(ROWS, HEADS, DIM)
taps = {"q": rand(HEADS * K, WIDTH), "k": rand(HEADS * K, WIDTH), "v": rand(HEADS * V, WIDTH)}
a_log, dt_bias, scale = rand(HEADS), rand(HEADS), 1 + rand(V)
w_g, w_o = rand(HEADS * V, DIM), rand(DIM, HEADS * V)

y = np.zeros_like(x)
for b in range(BATCH):
    state = np.zeros((ROWS, HEADS, K, V))
    past = [[] for _ in range(ROWS)]  # the projections of the tokens that a memory has taken
    for t in range(TOKENS):
        scores = np.exp(router @ x[b, t])
        p = scores / scores.sum()
        chosen = np.argsort(-p)[:ACTIVE]
        weight = {m: p[m] / p[chosen].sum() for m in chosen} | {MEMORIES: 1.0}
        read = np.zeros((HEADS, V))
        for m, w in weight.items():
            past[m].append({"q": w_q @ x[b, t], "k": w_k[m] @ x[b, t], "v": w_v[m] @ x[b, t]})
            mixed = {}
            for name, tap in taps.items():
                mixed[name] = silu(sum(tap[:, WIDTH - 1 - back] * past[m][-1 - back][name]
                                       for back in range(min(WIDTH, len(past[m])))))
            for h in range(HEADS):
                q = unit(mixed["q"][h * K : (h + 1) * K]) / np.sqrt(K)
                k = unit(mixed["k"][h * K : (h + 1) * K])
                v = mixed["v"][h * V : (h + 1) * V]
                beta = sigmoid(w_b[m, h] @ x[b, t])
                decay = np.exp(-np.exp(a_log[h]) * softplus(w_a[m, h] @ x[b, t] + dt_bias[h]))
                state[m, h] = decay * (np.eye(K) - beta * np.outer(k, k)) @ state[m, h] + beta * np.outer(k, v)
                read[h] += w * state[m, h].T @ q
        for h in range(HEADS):
            out = rms_norm(read[h], scale, EPS) * silu(w_g[h * V : (h + 1) * V] @ x[b, t])
            y[b, t] += w_o[:, h * V : (h + 1) * V] @ out

parameters = {
    "router.weight": router, "q_proj.weight": w_q, "k_proj.weight": w_k, "v_proj.weight": w_v, "b_proj.weight": w_b,
    "a_proj.weight": w_a, "A_log": a_log, "dt_bias": dt_bias, "conv.weight": np.concatenate(list(taps.values())),
    "g_proj.weight": w_g, "o_norm.weight": scale, "o_proj.weight": w_o,
}
settings = dict(heads=HEADS, key_dim=K, value_dim=V, memories=MEMORIES, active=ACTIVE, shared=True, conv=WIDTH)
write("mom", settings, x, y, parameters)

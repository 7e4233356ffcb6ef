"""The delta rule as the sheets of [deltanet] and [deltaproduct] have it, token by token and step by step."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, rms_norm, short_conv, sigmoid, silu, softplus, unit, write

HEADS, K, V, WIDTH, EPS = 2, 3, 4, 4, 1e-5


def make(key, seed, *, decay, gate, steps=1, reflect=False):
    rand = draw(seed)
    x = rand(BATCH, TOKENS, DIM, scale=1.0)
    shapes = {"q": HEADS * K, "k": steps * HEADS * K, "v": steps * HEADS * V}  # of every step, heads side by side
    w = {name: rand(rows, DIM) for name, rows in shapes.items()}
    taps = {name: rand(rows, WIDTH) for name, rows in shapes.items()}
    w_b, w_a, w_g, w_o = rand(steps * HEADS, DIM), rand(HEADS, DIM), rand(HEADS * V, DIM), rand(DIM, HEADS * V)
    a_log, dt_bias, scale = rand(HEADS), rand(HEADS), 1 + rand(V)
    y = np.zeros_like(x)
    for b in range(BATCH):
        stream = {name: silu(short_conv(x[b] @ w[name].T, taps[name])) for name in w}
        for h in range(HEADS):
            state = np.zeros((K, V))
            for t in range(TOKENS):
                q = unit(stream["q"][t, h * K : (h + 1) * K]) / np.sqrt(K)
                if decay:
                    state = np.exp(-np.exp(a_log[h]) * softplus(w_a[h] @ x[b, t] + dt_bias[h])) * state
                for j in range(steps):
                    part = j * HEADS + h
                    k = unit(stream["k"][t, part * K : (part + 1) * K])
                    v = stream["v"][t, part * V : (part + 1) * V]
                    beta = (2 if reflect else 1) * sigmoid(w_b[part] @ x[b, t])
                    state = (np.eye(K) - beta * np.outer(k, k)) @ state + beta * np.outer(k, v)
                out = rms_norm(state.T @ q, scale, EPS)
                if gate:
                    out = out * silu(w_g[h * V : (h + 1) * V] @ x[b, t])
                y[b, t] += w_o[:, h * V : (h + 1) * V] @ out
    parameters = {
        "qkv.weight": np.concatenate(list(w.values())),
        "conv.weight": np.concatenate(list(taps.values())),
        "b_proj.weight": w_b,
        "o_norm.weight": scale,
        "o_proj.weight": w_o,
    }
    parameters |= {"a_proj.weight": w_a, "A_log": a_log, "dt_bias": dt_bias} if decay else {}
    parameters |= {"g_proj.weight": w_g} if gate else {}
    settings = dict(heads=HEADS, key_dim=K, value_dim=V, conv=WIDTH)
    write(key, settings | (dict(steps=steps) if steps > 1 else {}), x, y, parameters)

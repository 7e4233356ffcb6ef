"""MemMamba: a pool of the best notes of earlier blocks, read by attention, in front of a Mamba block; loops over tokens."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, short_conv, sigmoid, silu, softplus, write

N, WIDTH, RANK, POOL, S, BLOCK = 3, 4, 2, 3, 4, 2
rand = draw(22)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
notes = {
    "score": rand(DIM),
    "score_bias": rand(1),
    "down.weight": rand(S, DIM),
    "q_proj.weight": rand(S, DIM),
    "o_proj.weight": rand(DIM, S),
    "g_proj.weight": rand(DIM, DIM + S),
    "g_proj.bias": rand(DIM),
}
mamba = {
    "in_proj.weight": rand(2 * DIM, DIM),
    "conv1d.weight": rand(DIM, WIDTH),
    "conv1d.bias": rand(DIM),
    "x_proj.weight": rand(RANK + 2 * N, DIM),
    "dt_proj.weight": rand(DIM, RANK),
    "dt_proj.bias": rand(DIM),
    "A_log": rand(DIM, N),
    "D": rand(DIM),
    "out_proj.weight": rand(DIM, DIM),
}


def with_notes(u):
    out, pool, waiting = u.copy(), [], []
    for t in range(TOKENS):
        if t % BLOCK == 0:  # a block has ended
            pool = sorted(pool + waiting, key=lambda note: -note[0])[:POOL]
            waiting = []
        query = notes["q_proj.weight"] @ u[t]
        weights = np.exp([0.0] + [query @ note / np.sqrt(S) for _, note in pool])
        weights = weights / weights.sum()
        c = np.zeros(S)
        for weight, (_, note) in zip(weights[1:], pool, strict=True):
            c += weight * note
        gate = sigmoid(notes["g_proj.weight"] @ np.concatenate([u[t], c]) + notes["g_proj.bias"])
        out[t] += gate * (notes["o_proj.weight"] @ c)
        score = notes["score"] @ u[t] + notes["score_bias"][0]
        waiting.append((score, sigmoid(score) * (notes["down.weight"] @ u[t])))
    return out


def block(u):
    inner, z = np.split(u @ mamba["in_proj.weight"].T, 2, axis=1)
    inner = silu(short_conv(inner, mamba["conv1d.weight"], mamba["conv1d.bias"]))
    out, state, A = np.zeros((TOKENS, DIM)), np.zeros((DIM, N)), -np.exp(mamba["A_log"])
    for t in range(TOKENS):
        delta, B, C = np.split(mamba["x_proj.weight"] @ inner[t], [RANK, RANK + N])
        dt = softplus(mamba["dt_proj.weight"] @ delta + mamba["dt_proj.bias"])
        state = np.exp(dt[:, None] * A) * state + (dt * inner[t])[:, None] * B
        out[t] = state @ C + mamba["D"] * inner[t]
    return (out * silu(z)) @ mamba["out_proj.weight"].T


y = np.stack([block(with_notes(row)) for row in x])
settings = dict(mixer=dict(kind="mamba", state=N, expand=1, conv=WIDTH, dt_rank=RANK), pool=POOL, note_dim=S, block=BLOCK)
write("memmamba", settings, x, y, {**notes, **{f"mixer.{name}": value for name, value in mamba.items()}})

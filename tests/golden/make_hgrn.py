"""HGRN in complex numbers, as the only layer, whose lower bound is 0: h_t = f e^{i theta} h_{t-1} + (1 - f) c."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, sigmoid, silu, write

rand = draw(10)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_i, b_i, w_f, b_f, w_g, b_g = rand(2 * DIM, DIM), rand(2 * DIM), rand(DIM, DIM), rand(DIM), rand(2 * DIM, DIM), rand(2 * DIM)
theta, scale, shift = rand(DIM), 1 + rand(2 * DIM), rand(2 * DIM)
w_o, b_o = rand(DIM, 2 * DIM), rand(DIM)

y = np.zeros_like(x)
for b in range(BATCH):
    h = np.zeros(DIM, complex)
    for t in range(TOKENS):
        c = silu(w_i @ x[b, t] + b_i)
        f = sigmoid(w_f @ x[b, t] + b_f)
        h = f * np.exp(1j * theta) * h + (1 - f) * (c[:DIM] + 1j * c[DIM:])
        u = silu(w_g @ x[b, t] + b_g) * np.concatenate([h.real, h.imag])
        u = (u - u.mean()) / np.sqrt(u.var() + 1e-5) * scale + shift
        y[b, t] = w_o @ u + b_o
write(
    "hgrn",
    {},
    x,
    y,
    {
        "i_proj.weight": w_i,
        "i_proj.bias": b_i,
        "f_proj.weight": w_f,
        "f_proj.bias": b_f,
        "g_proj.weight": w_g,
        "g_proj.bias": b_g,
        "theta": theta,
        "g_norm.weight": scale,
        "g_norm.bias": shift,
        "o_proj.weight": w_o,
        "o_proj.bias": b_o,
        "hgrn_lower_bounds.logits": rand(1, DIM),  # no layer lies below the only one: its bound is 0 whatever these are
    },
)

"""The gated recurrent unit, token by token, gates in the order r, z, n with a bias on either side."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, sigmoid, write

H = 5
rand = draw(22)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w, u, b, c, w_o = rand(3, H, DIM), rand(3, H, H), rand(3, H), rand(3, H), rand(DIM, H)
y = np.zeros_like(x)
for n in range(BATCH):
    h = np.zeros(H)
    for t in range(TOKENS):
        reset, keep = (sigmoid(w[i] @ x[n, t] + b[i] + u[i] @ h + c[i]) for i in (0, 1))
        new = np.tanh(w[2] @ x[n, t] + b[2] + reset * (u[2] @ h + c[2]))
        h = (1 - keep) * new + keep * h
        y[n, t] = w_o @ h
write(
    "gru",
    dict(hidden=H),
    x,
    y,
    {
        "weight_ih": w.reshape(3 * H, DIM),
        "weight_hh": u.reshape(3 * H, H),
        "bias_ih": b.reshape(3 * H),
        "bias_hh": c.reshape(3 * H),
        "o_proj.weight": w_o,
    },
)

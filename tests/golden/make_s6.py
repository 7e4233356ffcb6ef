"""S6: the selective state space of [selective-ssm-bounds] Method 1, one step a token, A of both signs."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, softplus, write

N = 3
rand = draw(13)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_b, w_c, q, p, A = rand(N, DIM), rand(N, DIM), rand(1, DIM), rand(1), rand(DIM, N)

y = np.zeros_like(x)
for b in range(BATCH):
    state = np.zeros((DIM, N))
    for t in range(TOKENS):
        u = x[b, t]
        dt = softplus(p[0] + q[0] @ u)
        for e in range(DIM):
            for n in range(N):
                state[e, n] = np.exp(dt * A[e, n]) * state[e, n] + dt * (w_b[n] @ u) * u[e]
            y[b, t, e] = (w_c @ u) @ state[e]
write(
    "s6",
    dict(state=N),
    x,
    y,
    {"B_proj.weight": w_b, "C_proj.weight": w_c, "dt_proj.weight": q, "dt_proj.bias": p, "A": A},
)

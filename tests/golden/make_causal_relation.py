"""CausalRN, exact pre-norm: every pair (i, j <= i) through LN and exp, one at a time; then LN of the mean, and a projection."""

import numpy as np
from common import BATCH, DIM, TOKENS, draw, write

HIDDEN = 7
rand = draw(21)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
w_1, b_1, w_2, w_3, b_3 = rand(HIDDEN, DIM), rand(HIDDEN), rand(HIDDEN, DIM), rand(DIM, HIDDEN), rand(DIM)


def norm(u):
    return (u - u.mean()) / np.sqrt(((u - u.mean()) ** 2).mean())


y = np.zeros_like(x)
for n in range(BATCH):
    for i in range(TOKENS):
        a = w_1 @ x[n, i] + b_1
        total = np.zeros(HIDDEN)
        for j in range(i + 1):
            total += np.exp(norm(a + w_2 @ x[n, j]))
        y[n, i] = w_3 @ norm(total / (i + 1)) + b_3
write(
    "causal_relation",
    dict(hidden=HIDDEN),
    x,
    y,
    {"a_proj.weight": w_1, "a_proj.bias": b_1, "b_proj.weight": w_2, "o_proj.weight": w_3, "o_proj.bias": b_3},
)

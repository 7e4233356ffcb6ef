"""S4D by its convolution kernel, summed term by term: K_l = 2 Re sum_n C_n Bbar_n Abar_n^l, zero-order hold."""

import math

import numpy as np
from common import BATCH, DIM, TOKENS, draw, sigmoid, write

N = 6
rand = draw(5)
x = rand(BATCH, TOKENS, DIM, scale=1.0)
log_dt, log_a_real, a_imag = rand(DIM) - 2, rand(DIM, N // 2), 3 * rand(DIM, N // 2)
c, skip, w, bias = rand(DIM, N // 2, 2), rand(DIM), rand(2 * DIM, DIM), rand(2 * DIM)
gelu = np.vectorize(lambda u: 0.5 * u * (1 + math.erf(u / math.sqrt(2))))

y = np.zeros_like(x)
for b in range(BATCH):
    inner = np.zeros((TOKENS, DIM))
    for d in range(DIM):
        a = -np.exp(log_a_real[d]) + 1j * a_imag[d]
        step = np.exp(log_dt[d])
        abar, bbar = np.exp(step * a), (np.exp(step * a) - 1) / a
        weight = c[d, :, 0] + 1j * c[d, :, 1]
        for t in range(TOKENS):
            inner[t, d] = skip[d] * x[b, t, d]
            for s in range(t + 1):
                inner[t, d] += 2 * np.real(np.sum(weight * bbar * abar ** (t - s))) * x[b, s, d]
    for t in range(TOKENS):
        out = w @ gelu(inner[t]) + bias
        y[b, t] = out[:DIM] * sigmoid(out[DIM:])
write(
    "s4d",
    dict(state=N),
    x,
    y,
    {
        "log_dt": log_dt,
        "log_A_real": log_a_real,
        "A_imag": a_imag,
        "C": c,
        "D": skip,
        "out.weight": w,
        "out.bias": bias,
    },
)

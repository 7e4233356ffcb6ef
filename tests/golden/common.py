"""What the golden numbers share: NumPy only, written from the papers' equations, never from seqloom's code.

Each make_<key>.py draws parameters and inputs, runs the equations as plain loops over tokens in float64, and writes
<key>.safetensors: "x", "y", the parameters under the layer's names, and the spec's settings as metadata.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

BATCH, TOKENS, DIM = 2, 11, 12


def draw(seed):
    rng = np.random.default_rng(seed)
    return lambda *shape, scale=0.5: rng.normal(size=shape) * scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def unit(x, eps=1e-6):
    return x / np.sqrt((x * x).sum() + eps)


def short_conv(x, weight, bias=None):
    """y_t[d] = sum_j weight[d, j] x_{t - width + 1 + j}[d], zeros before the first token; x [T, D]."""
    tokens = len(x)
    width = weight.shape[1]
    y = np.zeros_like(x)
    for t in range(tokens):
        for j in range(width):
            s = t - width + 1 + j
            if s >= 0:
                y[t] += weight[:, j] * x[s]
    return y if bias is None else y + bias


def write(key, settings, x, y, parameters):
    arrays = {"x": x, "y": y, **{f"layer.{name}": value for name, value in parameters.items()}}
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    save_file(
        arrays, Path(__file__).with_name(f"{key}.safetensors"), metadata={"settings": json.dumps(settings), "dim": str(DIM)}
    )

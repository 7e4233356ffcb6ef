"""Model operations: what the definition multiplies, whatever form computes it and whatever is computed twice.

    forward, per token = 2 (weights of matrix products) + sum over layers of the mixer's own products
    training, per token = 3 forward                     each product has two more in its gradient, of the same size

The mixer's own products per token, each multiplication and its addition counted as two operations:

    softmax             4 H K n        scores and sums over the n keys a query sees: (T + 1) / 2 causal, at most `window`
    a state S           4 |S|          S is written (2 |S|) and read (2 |S|), with |S| its numbers a row: H K V
    the delta rule      6 |S|          and read once more, for what the key finds there; a step of several keys, each of them

Decays, gates, convolutions, norms and activations are elementwise and count nothing, as do embeddings that are only looked up.
What a chunked form adds (products within a chunk) is not counted: a faster form of the same model then has a higher rate.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from seqloom.core import BadInput
from seqloom.core import state as st
from seqloom.core.mixer import Mixer

# passes over the state a token: a write, a read, and the read that the delta rule writes from; elementwise states: none
PASSES = {"linear": 2, "retention": 2, "gated_linear": 2, "mamba": 2, "mamba2": 2, "s4d": 2, "s6": 2, "longhorn": 2,
          "delta": 3, "gated_delta": 3, "delta_product": 3, "hgrn": 0}


class Operations(NamedTuple):
    """Per token of a forward pass: of weights, and of mixers."""

    weights: float
    mixers: float

    @property
    def forward(self) -> float:
        return self.weights + self.mixers

    @property
    def training(self) -> float:
        return 3 * self.forward


def of_model(model: nn.Module, tokens: int) -> Operations:
    """A built `SequenceModel` with a token head, over rows of `tokens` tokens."""
    blocks = sum(of_layer(block, tokens) for block in model.stack.blocks)
    inside = sum(_matrices(block) for block in model.stack.blocks)
    shared = _matrices(model.stack) - inside
    return Operations(2.0 * (inside + shared + model.head.weight.numel()), blocks)


def of_layer(block: nn.Module, tokens: int) -> float:
    """The mixer's own products, per token."""
    mixer: Mixer = block.mixer if hasattr(block, "mixer") else block
    spec = mixer.spec
    if spec.key == "softmax":
        return 4.0 * spec.heads * mixer.head * keys_seen(tokens, spec.direction == "causal", spec.window)
    if spec.key not in PASSES:
        raise BadInput(f"the operations of {spec.key} are not counted; they are for softmax, {', '.join(PASSES)}")
    state = st.leaves(mixer.init_state(1, device="meta").cells)[0]
    return 2.0 * PASSES[spec.key] * getattr(spec, "steps", 1) * state.numel()


def keys_seen(tokens: int, causal: bool, window: int | None) -> float:
    """Keys that a query sees, on average over a row."""
    if window is None or window >= tokens:
        return (tokens + 1) / 2 if causal else float(tokens)
    ends = window * (window - 1) / 2 / tokens  # what the first (or last) window - 1 queries lack
    return window - ends if causal else 2 * window - 1 - 2 * ends


def _matrices(module: nn.Module) -> int:
    """Numbers in the weights of linear maps."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


"""Positions: rotation of queries and keys (RoPE) and distance biases (ALiBi).

Everything is computed from python numbers when it is needed, in float32 (float64 for float64 inputs): no table is a
buffer, so that a model built without memory and loaded later has lost nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation)."""

    factor: float

    def frequencies(self, plain: Float[Tensor, " r"], theta: float) -> Float[Tensor, " r"]:
        return plain / self.factor

    @property
    def gain(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, and a ramp between (Llama 3.1).

    With n = original_length f / (2 pi) the turns that frequency f makes over the original context: n <= low_freq_factor
    is slow, n >= high_freq_factor is fast.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"Llama3Scaling: low_freq_factor {self.low_freq_factor} must be below {self.high_freq_factor}, "
                             "the high_freq_factor")

    def frequencies(self, plain: Float[Tensor, " r"], theta: float) -> Float[Tensor, " r"]:
        turns = plain * (self.original_length / (2 * math.pi))
        fast = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain * (fast + (1 - fast) / self.factor)

    @property
    def gain(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Channels that turn fewer than `slow` times over the original context are divided by `factor`, those that turn
    more than `fast` times are kept, with a ramp over the channels between; queries and keys are multiplied by `gain`
    (YaRN). gain None: 0.1 ln(factor) + 1.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention_gain: float | None = None
    whole_channels: bool = True  # the ends of the ramp are rounded outwards to whole channels

    def frequencies(self, plain: Float[Tensor, " r"], theta: float) -> Float[Tensor, " r"]:
        half = plain.shape[0]
        # the channel whose frequency makes `turns` turns over the original context
        channel = lambda turns: half * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)  # noqa: E731
        first, last = channel(self.fast), channel(self.slow)
        if self.whole_channels:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        ramp = torch.arange(half, dtype=plain.dtype, device=plain.device)
        slow = ((ramp - first) / max(last - first, 1e-3)).clamp(0, 1)
        return plain * (1 - slow + slow / self.factor)

    @property
    def gain(self) -> float:
        if self.attention_gain is not None:
            return self.attention_gain
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


# kinds that a saved spec may name
SCALINGS = {"rope_linear": LinearScaling, "rope_llama3": Llama3Scaling, "rope_yarn": YarnScaling}
Scaling = LinearScaling | Llama3Scaling | YarnScaling


class Rope:
    """Rotary positions: channel pair (i, i + R/2) of a head at position t turns by t theta^(-2i/R).

    dim: channels of a head. fraction: the share of them, from the first, that turns; R = the even number nearest below.
    The pairing by halves is that of Llama-type checkpoints. A plain value, not a module: it has no parameters.
    Raises: ValueError if no channel pair is left to turn.
    """

    def __init__(self, dim: int, *, theta: float = 10000.0, fraction: float = 1.0, scaling: Scaling | None = None):
        self.turned = int(dim * fraction) // 2 * 2
        if not 0 < self.turned <= dim:
            raise ValueError(f"RoPE turns pairs of channels, not {fraction:g} of {dim}; use a fraction in [{2 / dim:g}, 1]")
        self.theta, self.scaling = theta, scaling

    def angles(self, positions: Int[Tensor, "... t"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., T, R/2] in float32, or in float64 for float64 activations of `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.arange(0, self.turned, 2, dtype=wide, device=positions.device)
        frequencies = torch.pow(self.theta, steps * (-1 / self.turned))
        if self.scaling is not None:
            frequencies = self.scaling.frequencies(frequencies, self.theta)
        angle = positions.to(wide).unsqueeze(-1) * frequencies
        cos, sin = angle.cos(), angle.sin()
        gain = 1.0 if self.scaling is None else self.scaling.gain
        return (cos, sin) if gain == 1.0 else (cos * gain, sin * gain)


def rotate(x: Float[Tensor, "b t h k"], cos: Float[Tensor, "... t r"],
           sin: Float[Tensor, "... t r"]) -> Float[Tensor, "b t h k"]:
    """Turn the first 2r channels of every head by the angles of `Rope.angles`; the rest pass through.

    cos and sin are [T, R/2], or [B, T, R/2] where rows stand differently. Computed in their dtype, returned in x's.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = cos.shape[-1]
    a, b = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    turned = torch.addcmul(a * cos, b, sin, value=-1).to(x.dtype), torch.addcmul(b * cos, a, sin).to(x.dtype)
    return torch.cat(turned if 2 * half == x.shape[-1] else (*turned, x[..., 2 * half :]), -1)


def rotate_qkv(x: Float[Tensor, "b t n k"], cos: Float[Tensor, "... t r"], sin: Float[Tensor, "... t r"], heads: int,
               groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, heads, K] and k [B, T, groups, K], both turned, and v: the n = heads + 2 groups heads of one projection.

    The same as splitting and `rotate`, with one new tensor in each direction.
    """
    if torch.compiler.is_compiling():
        qk, v = x.split((heads + groups, groups), 2)
        q, k = rotate(qk, cos, sin).split((heads, groups), 2)
        return q, k, v
    turn = _TurnSplit.apply if torch.is_grad_enabled() else _TurnSplit.forward
    return turn(x, cos, sin, heads, groups)


class _TurnSplit(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing of x is kept, and the three gradients are written side by
    side, where autograd of the parts would keep two products and join three times."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        both = x.new_empty(*x.shape[:2], heads + groups, x.shape[-1])
        _turn_into(both, x[:, :, : heads + groups], cos, sin)
        return both[:, :, :heads], both[:, :, heads:], x[:, :, heads + groups :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.split = inputs[3:]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        heads, groups = ctx.split
        if torch.is_grad_enabled():  # a second derivative is wanted
            return torch.cat([rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv], 2), None, None, None, None
        dx = dq.new_empty(*dq.shape[:2], heads + 2 * groups, dq.shape[-1])
        _turn_into(dx[:, :, :heads], dq, cos, -sin)
        _turn_into(dx[:, :, heads : heads + groups], dk, cos, -sin)
        dx[:, :, heads + groups :] = dv
        return dx, None, None, None, None


def _turn_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[-1]
    if x.dtype != cos.dtype:
        out.copy_(rotate(x, cos, sin))
        return
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b, c, d = x[..., :half], x[..., half : 2 * half], out[..., :half], out[..., half : 2 * half]
    torch.mul(a, cos, out=c)
    c.addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=d)
    d.addcmul_(a, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """One slope a head for the bias -slope |i - j|: 2^(-8 n / heads), n = 1 .. heads.

    For a number of heads that is not a power of two: those of the power below, then every other one of the power
    above (as ALiBi's authors do).
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * n / power) for n in range(1, power + 1)]
    slopes += [2 ** (-4 * n / power) for n in range(1, 2 * (heads - power), 2)]
    return tuple(slopes)

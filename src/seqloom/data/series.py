"""Sensor series before a model: differences, scales, increments, rotations. Plain functions on values [..., T, C]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def with_deltas(x: Tensor, *, limit: float = 3000.0) -> Tensor:
    """x [..., T, C] and its first differences beside it, [..., T, 2 C]; the first one is 0, all are clipped to +-`limit`.

    Source: [hiss] Method 5.
    """
    return torch.cat([x, increments(x)], -1).clamp(-limit, limit)


def increments(y: Tensor) -> Tensor:
    """y_t - y_{t-1}, and 0 at the first step: targets that are velocities. Source: [hiss] Method 6."""
    return torch.diff(y, dim=-2, prepend=y[..., :1, :])


def displacements(y: Tensor) -> Tensor:
    """y_t - y_1: targets that are positions, from where the sequence begins. Source: [hiss] Method 6."""
    return y - y[..., :1, :]


class Scale(NamedTuple):
    """x -> (x - mean) / (times std), per channel, from the training data alone.

    The paper takes times=3 for inputs and 1 for targets ([hiss] Method 5).
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, x: Tensor, *, real: Tensor | None = None, times: float = 1.0) -> Scale:
        """From x [B, T, C], of the steps where `real` [B, T] is true. A channel that never moves keeps its unit."""
        values = x.flatten(0, -2) if real is None else x[real]
        std = values.std(0, correction=0) * times
        return cls(values.mean(0), torch.where(std > 0, std, 1.0))

    def apply(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def undo(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def rotate(x: Tensor, angle: Tensor, *, axes: tuple[int, int] = (0, 1)) -> Tensor:
    """Vectors x [B, T, C] turned by `angle` [B] (radians) in the plane of two channels: one angle for inputs and targets.

    Source: [hiss] Method 8.
    """
    i, j = axes
    cos, sin = (part.reshape(-1, *(1,) * (x.ndim - 2)) for part in (angle.cos(), angle.sin()))
    turned = x.clone()
    turned[..., i] = cos * x[..., i] - sin * x[..., j]
    turned[..., j] = sin * x[..., i] + cos * x[..., j]
    return turned


__all__ = ["Scale", "displacements", "increments", "rotate", "with_deltas"]

"""Squared error of series, and how far predicted motion drifts."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_error(y: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of (y - target)^2 over channels and real steps: what stands at others, NaN too, moves neither value nor gradient.

    Shapes: y, target [B, S, O], real [B, S]. The sum is divided by O times the number of real steps, so that a long sequence
    counts for more than a short one. Source: [hiss] Method 7.
    """
    error = y.float() - target
    if real is None:
        return error.square().mean()
    error = torch.where(real[..., None], y.float(), 0.0) - torch.where(real[..., None], target, 0.0)
    return error.square().sum() / (real.sum() * y.shape[-1]).clamp(min=1)


def drift(y: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """Distance between predicted and true displacement, summed from the first step on, mean over real steps. A scalar.

    For targets that are increments, in the unit of their sum. Source: [hiss] Users would expect (cum_err).
    """
    real = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device) if real is None else real
    error = torch.where(real[..., None], y.float(), 0.0) - torch.where(real[..., None], target, 0.0)
    far = error.cumsum(1).norm(dim=-1)
    return torch.where(real, far, 0.0).sum() / real.sum().clamp(min=1)


__all__ = ["drift", "squared_error"]

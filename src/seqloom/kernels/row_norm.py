"""Norms of rows: RMSNorm with a gate, and the L2 norm of queries and keys, over the last axis.

In float32 or wider throughout, whatever the dtype of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqloom.core.forms import gpu_only, narrow
from seqloom.core.mixer import accumulator

WIDEST = 32768  # channels of a row that fit one program


def rms_norm(x: Float[Tensor, "... n"], weight: Float[Tensor, " n"], gate: Float[Tensor, "... n"] | None = None, *,
             eps: float, gate_first: bool = False) -> Float[Tensor, "... n"]:
    """y = weight * u / sqrt(mean(u^2) + eps), u = x; times SiLU(gate), or with u = x * SiLU(gate) if `gate_first`."""
    wide = accumulator(x.dtype)
    if gate is not None and gate_first:
        return rms_norm(x.to(wide) * F.silu(gate.to(wide)), weight, eps=eps).to(torch.promote_types(x.dtype, gate.dtype))
    y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
    return y if gate is None else y * F.silu(gate)


def l2_norm(x: Float[Tensor, "... n"], *, eps: float) -> Float[Tensor, "... n"]:
    """x / sqrt(sum(x^2) + eps): a zero vector stays zero, with a finite gradient."""
    x_wide = x.to(accumulator(x.dtype))
    return (x_wide * torch.rsqrt(x_wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


@gpu_only()
def fused_rms_norm(x: Float[Tensor, "... n"], weight: Float[Tensor, " n"], gate: Float[Tensor, "... n"] | None = None, *,
                   eps: float, gate_first: bool = False) -> Float[Tensor, "... n"]:
    """As `rms_norm`, read and written once; rounded once, at the end. Every gradient is deterministic."""
    dtype = x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype)
    return _launch(x, weight, gate, dtype=dtype, eps=eps, mean=True, gate_first=gate_first)


@gpu_only()
def fused_l2_norm(x: Float[Tensor, "... n"], *, eps: float) -> Float[Tensor, "... n"]:
    """As `l2_norm`, read and written once."""
    return _launch(x, None, None, dtype=x.dtype, eps=eps, mean=False, gate_first=False)


def _launch(x: Tensor, weight: Tensor | None, gate: Tensor | None, *, dtype: torch.dtype, **options: Any) -> Tensor:
    from seqloom.kernels.triton import row_norm  # lazy: the package runs without Triton

    if x.shape[-1] > WIDEST:
        raise ValueError(f"the fused norm takes rows of at most {WIDEST} channels, not {x.shape[-1]}; the plain one takes any")
    gate = None if gate is None else gate.expand(x.shape)
    weight, gate = (None if t is None else t.to(narrow(t.dtype)) for t in (weight, gate))
    return row_norm.launch(x.to(narrow(x.dtype)), weight, gate, dtype=narrow(dtype), **options).to(dtype)


RMS_FORMS = {"plain": rms_norm, "fused": fused_rms_norm}
L2_FORMS = {"plain": l2_norm, "fused": fused_l2_norm}

"""Short depthwise convolution with a carried tail: y_t = sum_j w_j x_{t-W+1+j} + bias over the tokens of one segment.

Optionally with SiLU behind it. Computed as W shifted products in the [B, T, D] layout that everything around it has: a
convolution by the library wants [B, D, T] and transposes there and back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.core.forms import gpu_only, narrow
from seqloom.core.mixer import accumulator
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed

Activation = Literal["silu"]


def step(tail: Float[Tensor, "b w d"], x: Float[Tensor, "b d"], *, weight: Float[Tensor, "d k"],
         bias: Tensor | None = None, activation: Activation | None = None) -> tuple[Tensor, Tensor]:
    """One token: the tail holds the last K-1 inputs of the segment, oldest first."""
    window = torch.cat([tail, x[:, None].to(tail.dtype)], 1)
    y = (window * weight.T.to(window.dtype)).sum(1)
    y = y if bias is None else y + bias
    return window[:, 1:], (F.silu(y) if activation == "silu" else y).to(x.dtype)


def parallel(x: Float[Tensor, "b t d"], *, weight: Float[Tensor, "d k"], bias: Tensor | None = None,
             state: Float[Tensor, "b w d"] | None = None, segments: Segments | None = None,
             activation: Activation | None = None) -> Mixed:
    """All tokens at once, first-order gradients by hand. With segments, real tokens are first moved together, so that the
    taps of a token are its last K-1 real predecessors wherever pads stand; a tap that lies in another run is dropped."""
    batch, tokens, dim = x.shape
    width = weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, width - 1, dim)
    if segments is None:
        line = torch.cat([state.to(x.dtype), x], 1)
        y = _taps(line, weight, bias, None, activation == "silu")
        return Mixed(y, line[:, tokens:].to(state.dtype, copy=True))  # a view would keep all of the line
    # what holds nowhere needs no moving: packed rows without padding (known only where values may be looked at)
    moved = torch.compiler.is_compiling() or x.device.type != "cpu" or not bool(segments.real.all())
    run = segments.run
    if moved:
        source, place = segments.order()
        x, run = _Permute.apply(segments.hold(x), source, place), run.gather(1, source)
    line, run = torch.cat([state.to(x.dtype), x], 1), F.pad(run, (width - 1, 0))
    same = run.unfold(1, width, 1)[..., :-1] == run[:, width - 1 :, None]
    y = _taps(line, weight, bias, same, activation == "silu")
    if moved:
        y = segments.hold(_Permute.apply(y, place, source))
    # the tail: the last K-1 entries of the line before its holds, without those of earlier runs
    end = segments.real.sum(1)[:, None] + torch.arange(width - 1, device=x.device)
    inside = run.gather(1, end) == segments.run[:, -1:]
    tail = torch.where(inside[..., None], _rows(line, end), 0.0)
    return Mixed(y, tail.to(state.dtype))


@gpu_only()
def fused(x: Float[Tensor, "b t d"], *, weight: Float[Tensor, "d k"], bias: Tensor | None = None,
          state: Float[Tensor, "b w d"] | None = None, segments: Segments | None = None,
          activation: Activation | None = None) -> Mixed:
    """As `parallel`, by one Triton kernel that reads and writes every token once. Every gradient is deterministic."""
    from seqloom.kernels.triton import short_conv  # lazy: the package runs without Triton

    batch, tokens, dim = x.shape
    dtype, low = x.dtype, narrow(x.dtype)
    tail = x.new_zeros(batch, weight.shape[1] - 1, dim) if state is None else state
    order = run = count = None
    if segments is not None:
        # real tokens by rank, then the holds, as `Segments.order` has them, without a sort
        index = torch.arange(tokens, dtype=torch.int32, device=x.device).expand(batch, tokens)
        real = segments.real.contiguous()  # a view of rows that are side by side would lend the others its layout
        rank = real.cumsum(1, dtype=torch.int32)
        count = rank[:, -1].contiguous()
        place = torch.where(real, rank - 1, count[:, None] + index - rank)
        order, run = torch.empty_like(rank).scatter_(1, place.long(), index), segments.run.to(torch.int32).contiguous()
    weight, bias = weight.to(narrow(weight.dtype)).contiguous(), None if bias is None else bias.to(narrow(bias.dtype))
    y, last = short_conv.launch(x.to(low), weight, bias, tail.to(narrow(tail.dtype)).contiguous(), order, run, count,
                                activation == "silu")
    return Mixed(y.to(dtype), last.to(tail.dtype))


FORMS = {"parallel": parallel, "fused": fused}


def _taps(line: Float[Tensor, "b l d"], weight: Float[Tensor, "d k"], bias: Tensor | None, same: Bool[Tensor, "b t w"] | None,
          silu: bool) -> Float[Tensor, "b t d"]:
    """As `_Taps`. A compiler fuses and differentiates plain operations as well, and PyTorch 2.11 compiles `_Taps` to wrong
    gradients without a word."""
    if not torch.compiler.is_compiling():
        return _Taps.apply(line, weight, bias, same, silu)
    width, wide = weight.shape[1], accumulator(line.dtype)
    taps, tokens = weight.T.to(wide), line.shape[1] - width + 1
    sums = line[:, width - 1 :] * taps[-1]
    for j in range(width - 1):
        sums = sums + _where(same, j, line[:, j : j + tokens]) * taps[j]
    sums = sums if bias is None else sums + bias.to(wide)
    return (F.silu(sums) if silu else sums).to(line.dtype)


class _Taps(torch.autograd.Function):
    """Outputs [B, T, D] from the line of inputs [B, K-1+T, D]; `same` [B, T, K-1] says which taps are of the token's run."""

    @staticmethod
    def forward(ctx: Any, line: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None, silu: bool) -> Tensor:
        width, wide = weight.shape[1], accumulator(line.dtype)
        taps = weight.T.to(wide).contiguous()
        own = line[:, width - 1 :]
        sums = own * taps[-1] if bias is None else torch.addcmul(bias.to(wide), own, taps[-1])
        for j in range(width - 1):
            sums.addcmul_(_where(same, j, line[:, j : j + sums.shape[1]]), taps[j])
        ctx.save_for_backward(line, weight, bias, same, sums if silu else None)
        return (F.silu(sums) if silu else sums).to(line.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        line, weight, bias, same, sums = ctx.saved_tensors
        width, wide, tokens = weight.shape[1], accumulator(line.dtype), dy.shape[1]
        taps = weight.T.to(wide).contiguous()
        dsums = dy.to(wide) if sums is None else torch.ops.aten.silu_backward(dy.to(wide), sums)
        dline, product = torch.zeros(line.shape, dtype=wide, device=line.device), torch.empty_like(dsums)
        dtaps = []
        for j in range(width):
            back = dsums if j == width - 1 else _where(same, j, dsums)
            torch.mul(back, line[:, j : j + tokens], out=product)
            dtaps.append(product.sum((0, 1)))
            dline[:, j : j + tokens].addcmul_(back, taps[j])
        dweight = torch.stack(dtaps, 1).to(weight.dtype)
        return dline.to(line.dtype), dweight, None if bias is None else dsums.sum((0, 1)).to(bias.dtype), None, None


def _where(same: Bool[Tensor, "b t w"] | None, j: int, x: Float[Tensor, "b t d"]) -> Tensor:
    """x where tap j of a token is of its own run, else 0. A product with 0 or 1: a fifth of the time of torch.where."""
    return x if same is None else x * same[..., j, None].to(x.dtype)


class _Permute(torch.autograd.Function):
    """x[b, order[b, t]] for x [B, T, D]; the gradient is gathered by the inverse, where an indexing would add it up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(x, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _rows(gradient, *ctx.saved_tensors), None, None


def _rows(x: Float[Tensor, "b t d"], index: Int[Tensor, "b r"]) -> Tensor:
    """x[b, index[b, i]] for x [B, T, D], as one row gather."""
    flat = index + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)

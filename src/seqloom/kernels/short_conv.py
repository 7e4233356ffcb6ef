"""Short depthwise convolution with a carried tail: y_t = sum_j w_j x_{t-W+1+j} + bias over the tokens of one segment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqloom.core.segments import Segments
from seqloom.core.state import Mixed


def step(tail: Float[Tensor, "b w d"], x: Float[Tensor, "b d"], *, weight: Float[Tensor, "d k"],
         bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token: the tail holds the last K-1 inputs of the segment, oldest first."""
    window = torch.cat([tail, x[:, None].to(tail.dtype)], 1)
    y = (window * weight.T.to(window.dtype)).sum(1)
    return window[:, 1:], (y if bias is None else y + bias).to(x.dtype)


def parallel(x: Float[Tensor, "b t d"], *, weight: Float[Tensor, "d k"], bias: Tensor | None = None,
             state: Float[Tensor, "b w d"] | None = None, segments: Segments | None = None) -> Mixed:
    """All tokens at once. With segments, real tokens are first moved together, so that the taps of a token are its
    last K-1 real predecessors wherever pads stand; a tap that lies in another run is dropped."""
    batch, tokens, dim = x.shape
    width = weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, width - 1, dim)
    if segments is None:
        line = torch.cat([state.to(x.dtype), x], 1)
        y = F.conv1d(line.transpose(1, 2), weight[:, None].to(x.dtype), bias if bias is None else bias.to(x.dtype), groups=dim)
        return Mixed(y.transpose(1, 2), line[:, tokens:].to(state.dtype))
    source, place = segments.order()
    line = torch.cat([state.to(x.dtype), _rows(segments.hold(x), source)], 1)
    run = F.pad(segments.run.gather(1, source), (width - 1, 0))
    here = run[:, width - 1 :]
    y = 0.0 if bias is None else bias.to(x.dtype)
    for j in range(width):
        tap = line[:, j : j + tokens]
        same = (run[:, j : j + tokens] == here)[..., None]
        y = y + torch.where(same, tap, 0.0) * weight[:, j].to(x.dtype)
    y = segments.hold(_rows(y, place))
    # the tail: the last K-1 entries of the line before its holds, without those of earlier runs
    end = segments.real.sum(1)[:, None] + torch.arange(width - 1, device=x.device)
    inside = run.gather(1, end) == segments.run[:, -1:]
    tail = torch.where(inside[..., None], _rows(line, end), 0.0)
    return Mixed(y, tail.to(state.dtype))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x [B, T, D], as one row gather."""
    flat = index + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)

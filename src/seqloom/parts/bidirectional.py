"""What mixers that look both ways share: both directions in one batch, the value one token back, a centred convolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core.mixer import accumulator
from seqloom.core.segments import Segments
from seqloom.kernels import decay_scan, short_conv


def both(ahead: Tensor, behind: Tensor) -> Tensor:
    """Streams [B, T, ...] of two directions in one batch [2 B, T, ...]: the second half reads from the end."""
    return torch.cat([ahead, behind.flip(1)])


def apart(y: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `both`."""
    ahead, behind = y.chunk(2)
    return ahead, behind.flip(1)


def both_segments(segments: Segments | None) -> Segments | None:
    """The segments of a batch made by `both`."""
    if segments is None:
        return None
    return Segments(*(torch.cat(pair) for pair in zip(segments, decay_scan.flip(segments), strict=True)))


def previous(x: Tensor, segments: Segments | None = None) -> Tensor:
    """[B, T, ...]: x of the real token before each one in its segment, 0 for the first.

    Pads between do not count; what comes out at a pad means nothing.
    """
    shifted = F.pad(x[:, :-1], (0, 0) * (x.ndim - 2) + (1, 0))
    if segments is None:
        return shifted
    wide = lambda mask: mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))  # noqa: E731
    # without pads there is nothing to look for (known only where values may be looked at)
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and bool(segments.real.all()):
        return torch.where(wide(segments.starts()), 0.0, shifted)
    tokens = x.shape[1]
    latest = torch.where(segments.real, torch.arange(tokens, device=x.device), -1).cummax(1).values
    place = F.pad(latest, (1, 0), value=-1)[:, :tokens]
    found = place.clamp(min=0)
    inside = (place >= 0) & (segments.run.gather(1, found) == segments.run)
    return torch.where(wide(inside), x.gather(1, wide(found).expand_as(x)), 0.0)


class CentredConv(nn.Module):
    """Depthwise convolution around each token: y_t = SiLU(sum_j w_j x_{t+j-h} + bias), j = 0 .. 2h, over one segment.

    Shapes: x [B, T, dim], weight [dim, width]. Computed as the short causal convolution of the taps up to the token, and
    that of the later taps over the sequence read from its end, so that it knows of segments what that knows.
    Raises: ValueError if `width` is even: an even number of taps has no middle and would move the signal.
    """

    def __init__(self, dim: int, width: int, *, bias: bool = True):
        super().__init__()
        if width < 1 or width % 2 == 0:
            raise ValueError(f"a centred convolution of {width} taps has no middle one; use width={width + 1}")
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        half = self.weight.shape[1] // 2
        wide = x.to(accumulator(x.dtype))  # two sums, rounded once
        y = short_conv.parallel(wide, weight=self.weight[:, : half + 1], bias=self.bias, segments=segments).y
        if half:
            taps = F.pad(self.weight[:, half + 1 :].flip(1), (0, 1))  # the last is the token's own, counted above
            back = None if segments is None else decay_scan.flip(segments)
            y = y + short_conv.parallel(wide.flip(1), weight=taps, segments=back).y.flip(1)
        return F.silu(y).to(x.dtype)

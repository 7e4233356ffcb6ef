"""Regrouping segments into rows: each segment of a packed or padded batch becomes a row of its own.

A kernel that is exact on whole sequences (fused attention, an FFT convolution) is exact on packed ones when every
segment gets its own row. Rows are collected into buckets by length, (2^(k-1), 2^k] tokens to bucket k, and padded at
the end to the longest of the bucket: at most log2(T) + 1 dense calls, each at most twice its real tokens long, and no
mask where padding at the end cannot be seen (causal kernels).

    rows = regroup(segments)
    parts = [kernel(row, bucket) for row, bucket in zip(rows.split(x), rows.buckets)]     # [n, L, ...] each
    y = rows.join(parts)                                                                  # [B, T, ...]

Sizes depend on the data, so this is for eager code: compiled code takes a masked form instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seqloom.core.segments import Segments


class Bucket(NamedTuple):
    """n segments of similar length, as rows of L slots; L is the length of the longest.

    token: flat index b * T + t of each slot's token; a slot past the end repeats the segment's last token
    real:  False in the slots past the end
    row:   which row b of the batch a segment stands in
    run:   which run of that row it is (`Segments.run`): 0 goes on from the incoming state
    """

    token: Int[Tensor, "n l"]
    real: Bool[Tensor, "n l"]
    row: Int[Tensor, " n"]
    run: Int[Tensor, " n"]


@dataclass(frozen=True)
class Rows:
    """How tokens [B, T] and rows correspond: one to one between real tokens and real slots.

    shape:   (B, T) of the batch
    buckets: the rows, shortest first
    index:   [M] flat token of every slot of every bucket in order, M = sum of n L
    blanks:  [.] slots that hold no token: they read as 0 and no gradient comes from them
    place:   [B T] slot of every token
    holds:   [.] tokens that have no slot (padding)
    whole:   every row of the batch is one segment without padding, so the batch is its own single bucket
    """

    shape: tuple[int, int]
    buckets: tuple[Bucket, ...]
    index: Int[Tensor, " m"]
    blanks: Int[Tensor, " p"]
    place: Int[Tensor, " bt"]
    holds: Int[Tensor, " h"]
    whole: bool

    @cached_property
    def sizes(self) -> list[int]:
        return [bucket.token.numel() for bucket in self.buckets]

    def split(self, x: Tensor) -> list[Tensor]:
        """x [B, T, ...] as rows [n, L, ...], one tensor a bucket, zeros past the end of a segment.

        Tokens that hold are read by no row: NaN there moves neither value nor gradient.
        """
        if self.whole:
            return [x]
        flat = _Gather.apply(x.flatten(0, 1), self.index, self.blanks, self.place, self.holds)
        parts = flat.split(self.sizes)
        return [part.unflatten(0, bucket.token.shape) for part, bucket in zip(parts, self.buckets, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`: rows [n, L, ...] back to [B, T, ...], zeros at tokens that hold.

        What stands past the end of a segment is dropped and gets no gradient.
        """
        if self.whole:
            return parts[0]
        flat = [part.flatten(0, 1) for part in parts]
        if not flat:
            raise ValueError("these rows hold no token at all; test `rows.buckets` before computing on them")
        joined = flat[0] if len(flat) == 1 else torch.cat(flat)
        return _Gather.apply(joined, self.place, self.holds, self.index, self.blanks).unflatten(0, self.shape)


def regroup(segments: Segments) -> Rows:
    """The rows of `segments` [B, T]. Reads sizes from the device, once: for eager code only."""
    batch, tokens = segments.real.shape
    device = segments.real.device
    real = segments.real.flatten()
    if bool((segments.real & (segments.run == segments.run[:, :1])).all()):
        return _whole(segments)
    run = segments.run.flatten()
    flat = real.nonzero()[:, 0]  # real tokens in order; those of one segment are neighbours
    name = run[flat] + (flat // tokens) * (tokens + 1)
    first = torch.ones_like(flat, dtype=torch.bool)
    first[1:] = name[1:] != name[:-1]
    start = first.nonzero()[:, 0]
    length = torch.diff(start, append=start.new_tensor([flat.shape[0]]))
    powers = 2 ** torch.arange(max(tokens - 1, 1).bit_length() + 1, device=device)
    kind = torch.bucketize(length, powers)  # 0 for one token, k for (2^(k-1), 2^k]
    order = torch.argsort(kind, stable=True)
    count = torch.bincount(kind, minlength=powers.shape[0])
    longest = torch.zeros_like(powers).scatter_reduce_(0, kind, length, "amax")

    buckets, at = [], 0
    for rows, slots in torch.stack([count, longest], 1).tolist():
        if not rows:
            continue
        mine = order[at : at + rows]
        at += rows
        slot = torch.arange(slots, device=device)
        last = length[mine, None] - 1
        index = flat[start[mine, None] + torch.minimum(slot, last)]
        buckets.append(Bucket(index, slot <= last, index[:, 0] // tokens, run[index[:, 0]]))

    if buckets:
        index = torch.cat([bucket.token.flatten() for bucket in buckets])
        filled = torch.cat([bucket.real.flatten() for bucket in buckets])
    else:
        index, filled = flat, real[:0]
    slot = filled.nonzero()[:, 0]
    place = torch.zeros(batch * tokens, dtype=torch.int64, device=device)
    place[index[slot]] = slot
    return Rows((batch, tokens), tuple(buckets), index, (~filled).nonzero()[:, 0], place, (~real).nonzero()[:, 0], False)


@dataclass(frozen=True)
class Pack:
    """Segments one after the other without padding, as kernels for rows of any length want them (cu_seqlens).

    shape:   (B, T) of the batch
    starts:  [n + 1] int32: where each of the n segments begins among the real tokens, and their number
    longest: tokens of the longest segment
    even:    every row of the batch is one segment without padding
    index:   [N] flat token b * T + t of each real token, in order; None where all are real
    place:   [B T] rank of each token among the real ones; None likewise
    holds:   [.] flat tokens that hold; None likewise
    """

    shape: tuple[int, int]
    starts: Int[Tensor, " m"]
    longest: int
    even: bool
    index: Int[Tensor, " n"] | None = None
    place: Int[Tensor, " bt"] | None = None
    holds: Int[Tensor, " h"] | None = None

    def split(self, x: Tensor) -> Tensor:
        """The real tokens [N, ...] of x [B, T, ...]: a view where all are. NaN in the others moves no value or gradient."""
        if self.index is None:
            return x.flatten(0, 1)
        return _Gather.apply(x.flatten(0, 1), self.index, self.index[:0], self.place, self.holds)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`: [N, ...] back to [B, T, ...], zeros at tokens that hold."""
        if self.index is not None:
            x = _Gather.apply(x, self.place, self.holds, self.index, self.index[:0])
        return x.unflatten(0, self.shape)


def pack(segments: Segments) -> Pack:
    """The segments of a batch one after the other. Reads three numbers from the device, once: for eager code only."""
    batch, tokens = segments.real.shape
    real = segments.real.flatten()
    first = (segments.starts() | (segments.real & (segments.real.cumsum(1) == 1))).flatten()
    rank, segment = real.cumsum(0) - 1, first.cumsum(0) - 1
    begin = torch.where(first, rank, 0).cummax(0).values
    longest = torch.where(real, rank - begin + 1, 0).amax()
    total, number, most = torch.stack([real.sum(), first.sum(), longest]).tolist()
    # what is not a first token goes to the slot after the last, which is then overwritten: no size is read from the device
    starts = rank.new_zeros(number + 1).scatter_(0, torch.where(first, segment, number), rank)
    starts[number] = total
    even = total == batch * tokens and number == batch
    if total == batch * tokens:
        return Pack((batch, tokens), starts.int(), most, even)
    return Pack((batch, tokens), starts.int(), most, even, _places(real, total), rank.clamp(min=0),
                _places(~real, batch * tokens - total))


def _places(mask: Tensor, number: int) -> Tensor:
    """Where `mask` is True, `number` places: nonzero, for one who knows how many."""
    index = torch.arange(mask.shape[0], device=mask.device)
    return index.new_zeros(number + 1).scatter_(
        0, torch.where(mask, mask.cumsum(0) - 1, number), index)[:number]


def take(x: Tensor, index: Int[Tensor, "b r"]) -> Tensor:
    """x[b, index[b, r]] for x [B, T, ...]: [B, R, ...], as one gather of rows."""
    flat = index + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def _whole(segments: Segments) -> Rows:
    batch, tokens = segments.real.shape
    index = torch.arange(batch * tokens, device=segments.real.device)
    row = torch.arange(batch, device=index.device)
    bucket = Bucket(index.view(batch, tokens), segments.real, row, segments.run[:, 0])
    none = index[:0]
    return Rows((batch, tokens), (bucket,), index, none, index, none, True)


class _Gather(torch.autograd.Function):
    """x [N, ...] at `index`, zeros at `blanks`; the gradient is gathered back by `place`, zeros at `holds`.

    Autograd of an indexing adds into its gradient, one element at a time. Here tokens and slots correspond one to
    one, so that the gradient is a gather as well, and so is its own gradient.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor, blanks: Tensor, place: Tensor, holds: Tensor) -> Tensor:
        out = x.index_select(0, index)
        return out.index_fill_(0, blanks, 0) if blanks.numel() else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        index, blanks, place, holds = ctx.saved_tensors
        return _Gather.apply(gradient, place, holds, index, blanks), None, None, None, None

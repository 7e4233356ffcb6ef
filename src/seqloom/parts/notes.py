"""A pool of notes: of the tokens of earlier blocks the P of highest rank stay, and every token reads them by attention.

    notes of token t: those of its segment's blocks before t's own; of these the P of highest rank
    c_t = sum_i p_i n_i,  p = softmax(0, q_t . n_i / sqrt(S)) without the first,  n_i = sigmoid(score_i) note_i

The zero among the logits lets a token attend to nothing. Ranks: `priority` is the score, `fifo` the token's age (the P newest
stay), `random` a fixed scramble of its position (a reservoir). A block is `block` consecutive tokens of a segment; none of
its notes is read before it ends, so that what is written in a pass is never read in its own future, and block = 1 is the rule
token by token. Which notes stay is a selection without a gradient; scores learn by weighing what is read.

Streams: q and note [B, T, S], score [B, T] (a logit, float32 or wider), place [B, T] (position in the segment).
Source: [memmamba] Method 3, 4 and 9.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from seqloom.core import Mixed, Segments, scan
from seqloom.core.mixer import accumulator

Keep = Literal["priority", "fifo", "random"]
CHUNK = 16  # fewest tokens whose notes are gathered together: they share the pool before them


class Notes(NamedTuple):
    """The pool and the notes of the unfinished block, P + block - 1 slots, oldest first, empty ones before all."""

    note: Tensor   # [B, M, S]
    score: Tensor  # [B, M]
    age: Tensor    # [B, M] position in the segment + 1; 0: empty


def empty(batch: int, width: int, *, pool: int, block: int, dtype: torch.dtype, device: Any) -> Notes:
    """No notes yet, S = `width`; notes in `dtype`, scores in float32 or wider."""
    slots = pool + block - 1
    return Notes(torch.zeros(batch, slots, width, dtype=dtype, device=device),
                 torch.zeros(batch, slots, dtype=accumulator(dtype), device=device),
                 torch.zeros(batch, slots, dtype=torch.int64, device=device))


def step(state: Notes, q: Float[Tensor, "b s"], note: Float[Tensor, "b s"], score: Float[Tensor, " b"],
         place: Int[Tensor, " b"], *, pool: int, block: int, keep: Keep, threshold: float, salt: int) -> tuple[Notes, Tensor]:
    """One token: read the finished blocks' notes, then take a note. This is the definition; the other form must agree.

    A note is taken if sigmoid(score) > `threshold`; `salt` makes the random order of one pool another than its neighbour's.
    """
    wide = state.score.dtype
    seen = (state.age > 0) & ((state.age - 1) // block < (place // block)[:, None])
    seen = _best(_rank(state.score, state.age, keep, salt), seen, pool)
    read = state.score.sigmoid()[..., None] * state.note.to(wide)
    logits = (read * q.to(wide)[:, None]).sum(-1) / math.sqrt(q.shape[-1])
    logits = torch.cat([torch.zeros_like(logits[:, :1]), torch.where(seen, logits, -torch.inf)], 1)
    y = (logits.softmax(1)[:, 1:, None] * read).sum(1)
    age = torch.where(_admitted(score, threshold), place + 1, 0)
    notes = torch.cat([state.note, note.to(state.note.dtype)[:, None]], 1)
    scores, ages = torch.cat([state.score, score.to(wide)[:, None]], 1), torch.cat([state.age, age[:, None]], 1)
    done = (ages > 0) & ((ages - 1) // block < ((place + 1) // block)[:, None])
    kept = _best(_rank(scores, ages, keep, salt), done, pool) | ((ages > 0) & ~done)
    index, kept = _last(kept, state.age.shape[1])
    return _take(notes, scores, ages, index, kept), y.to(q.dtype)


def recurrent(q: Float[Tensor, "b t s"], note: Float[Tensor, "b t s"], score: Float[Tensor, "b t"],
              place: Int[Tensor, "b t"], *, state: Notes, segments: Segments | None = None, **rule: Any) -> Mixed:
    """Token by token. Notes are held in float32 or wider meanwhile, so that the gradients of many reads add up in it."""
    stored = state.note.dtype
    state = state._replace(note=state.note.to(accumulator(stored)))
    y, state, _ = scan(partial(step, **rule), q, note, score, place, state=state, segments=segments)
    return Mixed(y, state._replace(note=state.note.to(stored)))


def chunked(q: Float[Tensor, "b t s"], note: Float[Tensor, "b t s"], score: Float[Tensor, "b t"], place: Int[Tensor, "b t"], *,
            state: Notes, segments: Segments | None = None, pool: int, block: int, keep: Keep, threshold: float,
            salt: int) -> Mixed:
    """Chunks of tokens side by side: each has the pool before it, by merging pools in pairs (log-depth), and its own tokens.

    Linear in T: a chunk of C tokens reads P + 2 C gathered notes under a mask. Which they are has no gradient, and is an
    operator of its own, so that no compiler traces how many merges a length takes.
    """
    tokens = place.shape[1]
    dtype, wide, device = q.dtype, state.score.dtype, q.device
    run = torch.zeros_like(place)
    real = torch.ones_like(place, dtype=torch.bool)
    if segments is not None:  # real tokens side by side, holds after them
        q, note, score = segments.hold(q), segments.hold(note), segments.hold(score)
        source, back = segments.order()
        q, note = _rows(q, source), _rows(note, source)
        score, place = score.gather(1, source), place.gather(1, source)
        real = segments.real.gather(1, source)
        run = torch.where(real, segments.run.gather(1, source), segments.run[:, -1:])
    chunk = max(block, CHUNK)
    extra = -tokens % chunk
    front = -state.age.shape[1] % chunk
    start = front + state.age.shape[1]
    age = torch.where(real & _admitted(score, threshold), place + 1, 0)
    line = partial(_line, front=front, extra=extra)
    notes, scores = line(state.note, note.to(state.note.dtype)), line(state.score, score.to(wide))
    ages = line(state.age, age)
    runs = F.pad(F.pad(run - run[:, -1:], (0, extra)) + run[:, -1:], (start, 0))
    # the place of the next token of the last run; 0 where no token of it is in this call, and the pool stays as it is
    after = torch.where(real & (run == run[:, -1:]), place + 1, 0).amax(1)
    with torch.no_grad():
        index, seen, last, kept = _choose(scores.detach(), ages, runs, F.pad(place, (0, extra)), after, start, chunk, block,
                                          pool, state.age.shape[1], keep, salt)
    held = (_rows(scores[..., None], index.flatten(1)).sigmoid() * _rows(notes, index.flatten(1)).to(wide))
    held = held.unflatten(1, index.shape[1:])  # [b n w s]
    queries = F.pad(q, (0, 0, 0, extra)).to(wide).unflatten(1, (-1, chunk))
    with torch.autocast(device.type, enabled=False):
        logits = torch.where(seen, queries @ held.mT / math.sqrt(q.shape[-1]), -torch.inf)
        weights = torch.cat([torch.zeros_like(logits[..., :1]), logits], -1).softmax(-1)[..., 1:]
        y = (weights @ held).flatten(1, 2)[:, :tokens].to(dtype)
    if segments is not None:
        y = segments.hold(_rows(y, back))
    return Mixed(y, _take(notes, scores, ages, last, kept))


FORMS = {"recurrent": recurrent, "chunked": chunked}


@torch.library.custom_op("seqloom::choose_notes", mutates_args=(), schema=(
    "(Tensor score, Tensor age, Tensor run, Tensor place, Tensor after, SymInt start, int chunk, int block, int pool,"
    " int slots, str keep, int salt) -> (Tensor, Tensor, Tensor, Tensor)"))
def _choose(score: Tensor, age: Tensor, run: Tensor, place: Tensor, after: Tensor, start: int, chunk: int, block: int,
            pool: int, slots: int, keep: str, salt: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which notes of a line [B, L] the chunks of tokens from `start` on gather (index [B, n, W]), which of these each token
    reads ([B, n, C, W]), and what stays: index [B, slots], and whether that slot is filled.

    A chunk needs the notes before its own tokens' blocks began. The pool before the chunk in front of it holds all that can
    matter from there back (a block is no longer than a chunk); the two chunks themselves are looked through.
    """
    rank = _rank(score, age, keep, salt)
    chunks, first = age.shape[1] // chunk, start // chunk
    lines = torch.arange(age.shape[1], device=age.device)
    ends = run[:, chunk - 1 :: chunk]
    of = lambda x, index: x.gather(1, index.flatten(1)).unflatten(1, index.shape[1:])  # noqa: E731

    def best(index: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        """The P best of candidates [B, n, .] of the run in which each chunk ends."""
        some = some & (of(run, index) == ends[..., None])
        chosen, found = _last(_best(of(rank, index), some, pool), pool)
        return index.gather(-1, chosen), found

    # the P best of chunks c - 2^i + 1 .. c, i growing; index 0 stands where there is none
    own = lines.unflatten(0, (chunks, chunk)).expand(age.shape[0], -1, -1)
    index, some = best(_fill(own, pool), _fill(of(age, own) > 0, pool))
    span = 1
    while span < chunks:
        earlier = F.pad(index, (0, 0, span, 0))[:, :chunks], F.pad(some, (0, 0, span, 0))[:, :chunks]
        index, some = best(torch.cat([earlier[0], index], -1), torch.cat([earlier[1], some], -1))
        span *= 2
    before = F.pad(index, (0, 0, 2, 0))[:, first:chunks], F.pad(some, (0, 0, 2, 0))[:, first:chunks]
    near = torch.cat([own[:, first - 1 : -1], own[:, first:]], -1)
    index, some = torch.cat([before[0], near], -1), torch.cat([before[1], of(age, near) > 0], -1)

    of_run, of_place = (x.unflatten(1, (-1, chunk))[..., None] for x in (run[:, start:], place))  # [b n c 1]
    ages = of(age, index)[:, :, None]
    seen = some[:, :, None] & (of(run, index)[:, :, None] == of_run) & ((ages - 1) // block < of_place // block)
    # candidates in the order of their rank once a chunk; a token reads the first P that it may see
    order = _order(of(rank, index), some)[:, :, None].expand_as(seen)
    seen = seen.gather(-1, order)
    seen = torch.zeros_like(seen).scatter(-1, order, seen & (seen.cumsum(-1) <= pool))

    own_run = (age > 0) & (run == run[:, -1:])
    done = own_run & ((age - 1) // block < (after // block)[:, None])
    stays = _best(rank, done, pool) | (own_run & ~done)
    last, kept = _last(stays, slots)
    return index.contiguous(), seen, last, kept


@_choose.register_fake
def _(score: Tensor, age: Tensor, run: Tensor, place: Tensor, after: Tensor, start: int, chunk: int, block: int,
      pool: int, slots: int, keep: str, salt: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, chunks, wide = age.shape[0], place.shape[1] // chunk, pool + 2 * chunk
    return (age.new_empty(batch, chunks, wide), age.new_empty(batch, chunks, chunk, wide, dtype=torch.bool),
            age.new_empty(batch, slots), age.new_empty(batch, slots, dtype=torch.bool))


def _admitted(score: Tensor, threshold: float) -> Tensor:
    """sigmoid(score) > threshold, compared as logits: at 0 all are, at 1 none."""
    least = -math.inf if threshold <= 0 else math.inf if threshold >= 1 else math.log(threshold / (1 - threshold))
    return score > least


def _rank(score: Tensor, age: Tensor, keep: str, salt: int) -> Tensor:
    """What notes are ranked by, higher stays."""
    if keep == "priority":
        return score
    if keep == "fifo":
        return age
    low = 0xFFFFFFFF  # a bijection of 32 bits, so that no two positions tie
    mixed = (age + salt * 0x9E3779B1) & low
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & low
    return mixed ^ (mixed >> 16)


def _order(rank: Tensor, some: Tensor) -> Tensor:
    """Candidates [.., W], oldest first, in the order of their rank; the older of two equal ones first, those that are not
    `some` last."""
    lowest = torch.finfo(rank.dtype).min if rank.is_floating_point() else -1
    return torch.where(some, rank, lowest).argsort(dim=-1, descending=True, stable=True)


def _best(rank: Tensor, some: Tensor, count: int) -> Tensor:
    """[.., W] True for the `count` of highest rank among those that are `some`."""
    first = _order(rank, some)[..., :count]
    return torch.zeros_like(some).scatter(-1, first, True) & some


def _last(chosen: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Where the chosen of [.., W] stand, in their order, at the end of `slots` slots, and which slots are filled."""
    index = chosen.to(torch.int8).argsort(dim=-1, stable=True)[..., -slots:]
    return index, chosen.gather(-1, index)


def _fill(x: Tensor, least: int) -> Tensor:
    """At least `least` candidates [.., W], added in front as index 0, or False."""
    return F.pad(x, (max(least - x.shape[-1], 0), 0))


def _line(state: Tensor, stream: Tensor, *, front: int, extra: int) -> Tensor:
    """[B, front + M + T + extra, ..], zeros at both ends."""
    rest = (0, 0) * (state.ndim - 2)
    return torch.cat([F.pad(state, (*rest, front, 0)), F.pad(stream, (*rest, 0, extra))], 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x [B, L, S], as one row gather."""
    flat = index + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def _take(note: Tensor, score: Tensor, age: Tensor, index: Tensor, kept: Tensor) -> Notes:
    """The state from candidates and where its slots' notes stand among them; empty slots are 0."""
    return Notes(torch.where(kept[..., None], _rows(note, index), 0.0), torch.where(kept, score.gather(1, index), 0.0),
                 torch.where(kept, age.gather(1, index), 0))


__all__ = ["FORMS", "Keep", "Notes", "chunked", "empty", "recurrent", "step"]

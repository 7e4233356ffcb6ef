"""Matrix-state scan with decay: S_t = diag(a_t) S_{t-1} + k_t v_t', y_t = S_t' q_t.

Carries linear attention (a = 1), retention (a constant per head), Mamba-2 (a per head and token) and gated linear
attention (a per key channel). The decay is given as its logarithm: `log_a` is [B, T, H] (one per head), [B, T, H, K]
(one per key channel) or None (no decay).

Bidirectional forms add the same sum over the future, M_ij = prod_{s=i..j-1} a_s for j > i (query side), with the
diagonal counted once ([lion] section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from seqloom.core.mixer import accumulator
from seqloom.core.scan import carry
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed


def step(state: Float[Tensor, "b h k v"], q: Float[Tensor, "b h k"], k: Float[Tensor, "b h k"],
         v: Float[Tensor, "b h v"], log_a: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token, as the papers write it. This is the definition; every other form must agree with it."""
    wide = state.dtype
    if log_a is not None:
        a = log_a.to(wide).exp()
        state = (a[..., None] if log_a.ndim == 3 else a[..., None, None]) * state
    state = state + k.to(wide)[..., :, None] * v.to(wide)[..., None, :]
    return state, (q.to(wide)[..., :, None] * state).sum(-2).to(v.dtype)


def matrix(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t h k"], log_a: Tensor | None = None, *,
           segments: Segments | None = None, bidirectional: bool = False) -> Float[Tensor, "b h t t"]:
    """The T x T mixing weights: y = matrix @ v. For small T: an oracle and a picture, quadratic in T."""
    tokens = q.shape[1]
    wide = accumulator(q.dtype)
    q, k = q.to(wide), k.to(wide)
    same = _same_run(segments, tokens, q.device)
    if segments is not None:
        q, k = segments.hold(q), segments.hold(k)
        log_a = None if log_a is None else segments.hold(log_a)
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    keep = same if bidirectional else same & lower
    if log_a is None:
        return einsum(q, k, "b i h k, b j h k -> b h i j") * keep[:, None]
    total = log_a.to(wide).cumsum(1)
    # forward pairs decay over s = j+1..i; backward ones over s = i..j-1, which is the sum shifted by one
    ahead = total[:, :, None] - total[:, None, :]
    shifted = total - log_a.to(wide)
    behind = shifted[:, None, :] - shifted[:, :, None]
    place = lower[None, :, :].reshape(1, tokens, tokens, *(1,) * (log_a.ndim - 2))
    mask = keep.reshape(*keep.shape, *(1,) * (log_a.ndim - 2))
    weight = torch.where(mask, torch.where(place, ahead, behind), -torch.inf).exp()
    if log_a.ndim == 3:
        return einsum(q, k, weight, "b i h k, b j h k, b i j h -> b h i j")
    return einsum(q, k, weight, "b i h k, b j h k, b i j h k -> b h i j")


def parallel(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None = None, *, state: Tensor | None = None,
             segments: Segments | None = None, bidirectional: bool = False) -> Mixed:
    """By the T x T weights. Quadratic in T: an oracle, and fastest for very short sequences."""
    wide = accumulator(v.dtype)
    if segments is not None:
        v = segments.hold(v)
    y = einsum(matrix(q, k, log_a, segments=segments, bidirectional=bidirectional), v.to(wide), "b h i j, b j h v -> b i h v")
    if bidirectional:
        return Mixed(y.to(v.dtype))
    held = (q, k) if segments is None else (segments.hold(q), segments.hold(k))
    q, k = (x.to(wide) for x in held)
    total = torch.zeros_like(q) if log_a is None else (log_a if segments is None else segments.hold(log_a)).to(wide).cumsum(1)
    if total.ndim == 3:
        total = total[..., None]
    run = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device) if segments is None else segments.run
    kept = (run == run[:, -1:])[..., None, None]
    new = einsum(torch.where(kept, k * (total[:, -1:] - total).exp(), 0.0), v.to(wide), "b t h k, b t h v -> b h k v")
    if state is not None:
        reads = (run == 0)[..., None, None]
        y = y + einsum(torch.where(reads, q * total.exp(), 0.0), state, "b t h k, b h k v -> b t h v")
        last = total[:, -1].exp()[..., None]
        new = new + torch.where((run[:, -1] == 0)[:, None, None, None], last * state, 0.0)
    y = y.to(v.dtype)
    return Mixed(y if segments is None else segments.hold(y), new)


def chunked(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t h k"], v: Float[Tensor, "b t h v"],
            log_a: Tensor | None = None, *, state: Float[Tensor, "b h k v"] | None = None,
            segments: Segments | None = None, chunk: int = 64, diagonal: bool = True) -> Mixed:
    """By chunks: masked products inside, one state per chunk between. Linear in T in time and memory.

    A chunk is one masked matrix product with weights exp(L_i - L_j), L the running sum of log decays; what leaves it
    is one [K, V] write, and `core.scan.carry` joins these over chunks. `diagonal=False` leaves out each token's own
    write (the second direction of a bidirectional pass).
    """
    batch, tokens, heads, key = q.shape
    wide = accumulator(v.dtype)
    if log_a is not None and log_a.ndim == 4:
        chunk = min(chunk, 1 << max(tokens - 1, 1).bit_length())
    else:
        chunk = min(chunk, tokens)
    extra = -tokens % chunk
    if segments is not None:
        q, k, v = segments.hold(q), segments.hold(k), segments.hold(v)
        if log_a is not None:  # the decay of a first token reaches only pairs that the selection drops
            log_a = torch.where(segments.starts().reshape(batch, tokens, *(1,) * (log_a.ndim - 2)), 0.0, segments.hold(log_a))
        segments = segments.pad(extra)
    split = lambda x: rearrange(F.pad(x.to(wide), (0, 0, 0, 0, 0, extra)), "b (n c) h d -> b n h c d", c=chunk)  # noqa: E731
    q, k, values = split(q), split(k), split(v)
    total = None
    if log_a is not None:
        total = split(log_a if log_a.ndim == 4 else log_a[..., None]).cumsum(-2)  # [b n h c k or 1]

    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril(0 if diagonal else -1)
    keep, reads, writes, alive = lower, None, None, None
    if segments is not None:
        run = segments.run.unflatten(1, (-1, chunk))  # [b n c]
        last = run[..., -1]
        entering = F.pad(last, (1, 0))[:, :-1]  # the count of boundaries before each chunk
        keep = (lower & (run[..., :, None] == run[..., None, :]))[:, :, None]
        reads = (run == entering[..., None])[:, :, None, :, None]
        writes = (run == last[..., None])[:, :, None, :, None]
        alive = (last == entering)[:, :, None, None, None]

    scores = _scores(q, k, total, keep)
    y = scores @ values
    kept = k if total is None else k * (total[..., -1:, :] - total).exp()
    kept = kept if writes is None else torch.where(writes, kept, 0.0)
    write = kept.transpose(-1, -2) @ values  # [b n h k v]
    decay = torch.ones((), dtype=wide, device=q.device) if total is None else total[..., -1, :, None].exp()
    decay = decay.expand(*write.shape[:3], decay.shape[-2] if total is not None else 1, 1)
    decay = decay if alive is None else torch.where(alive, decay, 0.0)
    start = write.new_zeros(batch, heads, key, v.shape[-1]) if state is None else state
    before, new = carry(decay, write, start)
    query = q if total is None else q * total.exp()
    y = y + (query if reads is None else torch.where(reads, query, 0.0)) @ before
    y = rearrange(y, "b n h c v -> b (n c) h v")[:, :tokens].to(v.dtype)
    return Mixed(y, new)


def bidirectional(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None = None, *, state: None = None,
                  segments: Segments | None = None, chunk: int = 64) -> Mixed:
    """Both directions by two chunked passes, the second over the flipped sequence without its diagonal."""
    ahead = chunked(q, k, v, log_a, segments=segments, chunk=chunk)
    flipped = None if segments is None else flip(segments)
    streams = (x if x is None else x.flip(1) for x in (q, k, v, log_a))
    behind = chunked(*streams, segments=flipped, chunk=chunk, diagonal=False)
    return Mixed(ahead.y + behind.y.flip(1))


def flip(segments: Segments) -> Segments:
    """The same segments read from the end: runs count from the other side."""
    run = segments.run
    return Segments(segments.real.flip(1), (run[:, -1:] - run).flip(1))


def _scores(q: Tensor, k: Tensor, total: Tensor | None, keep: Tensor) -> Tensor:
    """Masked products q_i k_j weighted by exp(L_i - L_j), [b n h c c]; every exponent taken is <= 0."""
    if total is None:
        return torch.where(keep, q @ k.transpose(-1, -2), 0.0)
    if total.shape[-1] == 1:
        # mask before exp: a future pair has a positive exponent and overflows to inf
        weight = torch.where(keep, total - total.transpose(-1, -2), -torch.inf).exp()
        return torch.where(keep, q @ k.transpose(-1, -2), 0.0) * weight
    # One decay per key channel does not factor out of the product. Halve the chunk again and again: the pairs that
    # join two neighbouring halves are taken relative to the last token of the first half, so both factors are <= 1.
    chunk = q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]  # blocks of one token: [.. c 1 1]
    size = 1
    while size < chunk:
        first, second = (x.unflatten(-2, (-1, 2, size)) for x in (k, q))
        level = total.unflatten(-2, (-1, 2, size))
        middle = level[..., 0, -1:, :]
        left = first[..., 0, :, :] * (middle - level[..., 0, :, :]).exp()
        right = second[..., 1, :, :] * (level[..., 1, :, :] - middle).exp()
        cross = right @ left.transpose(-1, -2)
        blocks = scores.unflatten(-3, (-1, 2))
        top = torch.cat([blocks[..., 0, :, :], torch.zeros_like(cross)], -1)
        scores = torch.cat([top, torch.cat([cross, blocks[..., 1, :, :]], -1)], -2)
        size *= 2
    return torch.where(keep, scores[..., 0, :, :], 0.0)


def _same_run(segments: Segments | None, tokens: int, device: torch.device) -> Tensor:
    """[B or 1, T, T]: pairs with no boundary between them."""
    if segments is None:
        return torch.ones(1, tokens, tokens, dtype=torch.bool, device=device)
    return segments.run[:, :, None] == segments.run[:, None, :]

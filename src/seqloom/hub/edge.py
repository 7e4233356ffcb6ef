"""What transformers says of padding and packing, as segments: the one place where it is translated.

In: attention_mask [B, T] (0 at pads), position_ids that begin again at each packed sample, cu_seq_lens, seq_idx.
Out: segments [B, T], or None where every token is real and of one sample, which is the fast path.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from seqloom.core import BadInput

Ids = Int[Tensor, "b t"]


def segments_of(batch: int, tokens: int, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                cu_seq_lens: Tensor | None = None, seq_idx: Tensor | None = None, past: bool = False,
                device: torch.device | str | None = None) -> Ids | None:
    """Segments of the `tokens` new tokens of each row.

    attention_mask: [B, T], or [B, past + T] of which the last T count; a whole-number mask may number its samples 1, 2, ..
    position_ids:   [B, T] or [1, T]; among real tokens, one that is not its predecessor plus 1 begins a sample. After a
                    past they say nothing: tokens go on where the state stands
    cu_seq_lens:    [n + 1] with a single row: sample i is tokens cu[i] to cu[i + 1]
    seq_idx:        [B, T], the number of the sample from 0
    Raises: BadInput for a mask that is not [B, T], or lengths that do not add up.
    """
    mask = None
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[1] < tokens or attention_mask.shape[0] != batch:
            raise BadInput(
                f"attention_mask must be [batch, tokens] = [{batch}, {tokens}] with 0 at padding, "
                f"found {list(attention_mask.shape)}; other patterns belong to the mixers' own settings"
            )
        mask = attention_mask[:, attention_mask.shape[1] - tokens :].to(device=device, dtype=torch.int64)
    samples = None
    if seq_idx is not None:
        samples = seq_idx.to(device=device, dtype=torch.int64).expand(batch, -1) + 1
    elif cu_seq_lens is not None:
        samples = _from_lengths(cu_seq_lens.to(device), batch, tokens)
    elif position_ids is not None and not past:
        samples = _from_positions(position_ids.to(device).expand(batch, -1), mask)
    if samples is None:
        segments = mask
    else:
        segments = samples if mask is None else torch.where(mask != 0, samples, 0)
    # looking at the values would break a graph; there the segments stay
    if segments is None or (not torch.compiler.is_compiling() and bool((segments == 1).all())):
        return None
    return segments


def _from_positions(positions: Ids, mask: Ids | None) -> Ids:
    if mask is None:
        begins = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
        return begins.cumsum(1) + 1
    # the real token before each one: -1 where there is none
    real = mask != 0
    index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    latest = torch.where(real, index, -1).cummax(1).values
    before = torch.nn.functional.pad(latest, (1, 0), value=-1)[:, :-1]
    begins = real & (before >= 0) & (positions != positions.gather(1, before.clamp(min=0)) + 1)
    return begins.cumsum(1) + 1


def _from_lengths(ends: Tensor, batch: int, tokens: int) -> Ids:
    if batch != 1 or int(ends[-1]) != tokens or int(ends[0]) != 0 or bool((ends.diff() < 0).any()):
        raise BadInput(
            f"cu_seq_lens must rise from 0 to the number of tokens of a single row, {tokens}; "
            f"found {ends.tolist()[:8]} with {batch} rows"
        )
    return torch.bucketize(torch.arange(tokens, device=ends.device), ends.to(torch.int64), right=True)[None]


def across_samples(labels: Ids, segments: Ids | None) -> Ids:
    """Labels for next-token prediction without those whose previous token belongs to another sample: -100 there."""
    if segments is None:
        return labels
    before = torch.nn.functional.pad(segments, (1, 0))[:, :-1]
    return labels.masked_fill((segments != before) & (segments != 0) & (before != 0), -100)

"""Planted mistakes: each one, put into the library's code at run time, must turn a named law red.

A mistake is a piece of source and what stands in its place. When the code moves on and the piece is gone, the test says
so: plant the mistake anew, do not drop it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import textwrap
from typing import NamedTuple

import pytest

from seqloom.laws import LAWS, apply, cases

CASES = {case.name: case for case in cases()}


class Mistake(NamedTuple):
    """In function `where` of the library, `old` becomes `new`, and each pair of `also` alike; then `law` fails on `case`."""

    what: str
    where: str
    old: str
    new: str
    case: str
    law: str
    also: tuple[tuple[str, str], ...] = ()


def function(where: str):
    """The innermost function at a dotted place such as `kernels.decay_scan.chunked` or `core.mixer.Mixer.forward`."""
    parts = where.split(".")
    module = importlib.import_module(f"seqloom.{parts[0]}.{parts[1]}")
    found = module
    for part in parts[2:]:
        found = inspect.getattr_static(found, part)
    found = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
    found = found.fget if isinstance(found, property) else getattr(found, "_init_fn", found)  # of a torch custom operator
    return inspect.unwrap(found)


@contextlib.contextmanager
def planted(mistake: Mistake):
    """The mistake in force inside the block: the function keeps its identity, so every table that holds it sees the change."""
    target = function(mistake.where)
    source = textwrap.dedent(inspect.getsource(target))
    for old, new in ((mistake.old, mistake.new), *mistake.also):
        count = source.count(old)
        assert count == 1, f"{mistake.where} holds {old!r} {count} times, not once: plant {mistake.what!r} anew"
        source = source.replace(old, new)
    tree = compile(source, target.__code__.co_filename, "exec", flags=annotations.compiler_flag)
    codes = [const for const in tree.co_consts if inspect.iscode(const) and const.co_name == target.__name__]
    assert len(codes) == 1 and codes[0].co_freevars == target.__code__.co_freevars
    kept = target.__code__
    target.__code__ = codes[0]
    try:
        yield
    finally:
        target.__code__ = kept


MISTAKES = [
    # the definition and the chunked scan
    Mistake(
        "a factor 2 in the definition's write",
        "kernels.decay_scan.step",
        "state = state + k",
        "state = state + 2 * k",
        "linear", "forms_agree",
    ),
    Mistake(
        "a chunk leaves out its diagonal",
        "kernels.decay_scan._Heads.forward",
        "_scores(q, k, weight, same, diagonal)",
        "_scores(q, k, weight, same, False)",
        "linear", "forms_agree",
    ),
    Mistake(
        "the second direction counts the diagonal again",
        "kernels.decay_scan.bidirectional",
        "diagonal=False",
        "diagonal=True",
        "linear-bidirectional", "forms_agree",
    ),
    Mistake(
        "a pair with the future is not masked",
        "kernels.decay_scan._masked",
        "scores.triu_(0 if diagonal else 1)",
        "scores.triu_(-1)",
        "linear", "future",
    ),
    Mistake(
        "a pair across a boundary is kept",
        "kernels.decay_scan._masked",
        "scores if same is None else",
        "scores if True else",
        "linear", "packing",
    ),
    Mistake(
        "the carry between chunks survives a boundary",
        "kernels.decay_scan._weights",
        "return None, since, until, since[..., -1:]",
        "return None, since, until, torch.ones_like(since[..., -1:])",
        "linear", "packing",
    ),
    Mistake(
        "a chunk reads the incoming state after a boundary",
        "kernels.decay_scan.chunked",
        "reads = run == F.pad(run[..., -1], (1, 0))[:, :-1, None]",
        "reads = run >= 0",
        "linear", "packing",
    ),
    Mistake(
        "an earlier segment's writes leave the chunk",
        "kernels.decay_scan._weights",
        "(reads, same[..., -1])",
        "(reads, same[..., -1] | True)",
        "linear", "packing",
    ),
    Mistake(
        "the incoming state is dropped",
        "kernels.decay_scan.chunked",
        "if state is None else state",
        "if True else state",
        "linear", "resume",
    ),
    # the loop every recurrence runs in
    Mistake(
        "a boundary does not reset",
        "core.scan.scan",
        "_where(starts[:, t], empty, state)",
        "state",
        "linear", "packing",
    ),
    # the base layer, segments and states
    Mistake(
        "pads are multiplied by zero, not selected",
        "core.segments.Segments.hold",
        "torch.where(real, x, torch.full((), fill, dtype=x.dtype, device=x.device))",
        "x * real + fill * ~real",
        "linear", "poison",
    ),
    Mistake(
        "the state forgets which segment it was in",
        "core.segments.resolve",
        "ids.gather(1, last.clamp(min=0))[:, 0], track.segment)",
        "0 * ids[:, 0], track.segment)",
        "linear", "resume",
    ),
    Mistake(
        "a boundary between calls goes unseen",
        "core.segments.resolve",
        "(ids != previous)",
        "(ids != previous) & (before >= 0)",
        "linear", "resume",
    ),
    Mistake(
        "the input state is written to",
        "core.mixer.Mixer.forward",
        "if donate and state is not None",
        "if state is not None",
        "linear", "donate",
    ),
    Mistake(
        "a donated state moves",
        "core.mixer.Mixer.forward",
        "if donate and state is not None",
        "if False",
        "linear", "donate",
    ),
    Mistake(
        "an undeclared field is dropped in silence",
        "core.info.Info.check",
        "if extra:",
        "if False:",
        "linear", "undeclared_info",
    ),
    Mistake(
        "the state is predicted for one row",
        "core.mixer.Mixer.state_bytes",
        "init_state(batch,",
        "init_state(1,",
        "linear", "state_bytes",
    ),
    Mistake(
        "reordering shifts the rows",
        "core.state.select",
        "index.to(leaf.device)",
        "(index + 1) % leaf.shape[0]",
        "linear", "beam",
    ),
    Mistake(
        "states are kept in the narrow dtype",
        "core.mixer.accumulator",
        "torch.promote_types(dtype, torch.float32)",
        "dtype",
        "linear", "bf16_error",
    ),
    # linear attention and the short convolution
    Mistake(
        "the normaliser is forgotten on resume",
        "mixers.linear.LinearAttentionLayer.mix",
        "else cells.memory,",
        "else torch.cat([cells.memory[..., :-1], 0 * cells.memory[..., -1:]], -1),",
        "linear", "resume",
    ),
    Mistake(
        "rows of a batch share their mean",
        "mixers.linear.LinearAttentionLayer._streams",
        "self.qkv(x), None",
        "self.qkv(x - 0.1 * x.mean(0)), None",
        "linear", "batch_slot",
    ),
    Mistake(
        "the convolution's tail is not carried",
        "kernels.short_conv.parallel",
        "line[:, tokens:]",
        "0 * line[:, tokens:]",
        "linear-conv", "resume",
    ),
    Mistake(
        "a tap reaches into another segment",
        "kernels.short_conv.parallel",
        "== run[:, width - 1 :, None]",
        ">= 0",
        "linear-conv", "packing",
    ),
    Mistake(
        "the convolution looks one token ahead",
        "kernels.short_conv.parallel",
        "line = torch.cat([state.to(x.dtype), x], 1)",
        "line = torch.cat([state.to(x.dtype)[:, 1:], x, x[:, :1]], 1)",
        "linear-conv", "future",
    ),
    # decays: gated DeltaNet without its erasing is a scan with one decay per head
    Mistake(
        "the decay is shifted by one token",
        "kernels.decay_scan._weights",
        "device=log_a.device).triu(1)",
        "device=log_a.device).triu()",
        "gated_delta-adding", "forms_agree",
    ),
    Mistake(
        "the decay is applied after the write",
        "kernels.decay_scan.step",
        "state = state + k[",
        "state = state + (1 if log_a is None else a[..., None]) * k[",
        "gated_delta-adding", "forms_agree",
    ),
    Mistake(
        "decays between two tokens are a difference of running sums",
        "kernels.decay_scan._weights",
        "torch.where(later, log_a[..., None, :], 0.0).cumsum(-1)",
        "(log_a.cumsum(-1)[..., None, :] - log_a.cumsum(-1)[..., None])",
        "gated_delta-adding", "float32_segments",
    ),
    Mistake(
        "a cast forgets the marks",
        "core.marks.cast",
        '["keep_float32"]',
        '["keep_float32"] and False',
        "gated_delta", "marked_dtypes",
    ),
    Mistake(
        "a parameter is cut from the graph",
        "mixers.gated_delta.GatedDeltaNetLayer._log_decay",
        "self.A_log.to(wide).exp()",
        "self.A_log.to(wide).exp().detach()",
        "gated_delta", "gradient",
    ),
    # the delta rule
    Mistake(
        "beta is dropped from the triangular factor",
        "kernels.delta_scan._Chunks.forward",
        "pairs.mul_(beta)",
        "pairs",
        "delta", "forms_agree",
    ),
    Mistake(
        "the triangular factor takes the beta of its column",
        "kernels.delta_scan._whole",
        "einsum(beta[..., None] * k, k,",
        "einsum(k, beta[..., None] * k,",
        "delta", "forms_agree",
    ),
    Mistake(
        "the triangular factor joins two segments",
        "kernels.delta_scan._whole",
        '"b i h k, b j h k -> b h i j") * weight).tril(-1)',
        '"b i h k, b j h k -> b h i j") * (weight if log_a is not None else 1)).tril(-1)',
        "delta", "packing",
    ),
    Mistake(
        "the erasing reads the state before its decay",
        "kernels.delta_scan.step",
        "state = log_a.to(wide).exp()[..., None, None] * state",
        "old, state = state, log_a.to(wide).exp()[..., None, None] * state",
        "gated_delta", "forms_agree",
        also=(("(key * state).sum(-2)", "(key * (state if log_a is None else old)).sum(-2)"),),
    ),
    Mistake(
        "a chunk's transition survives a boundary",
        "kernels.delta_scan._select",
        "last == entering",
        "last >= 0",
        "delta", "packing",
    ),
    Mistake(
        "the backward pass forgets the writes that leave a chunk",
        "kernels.delta_scan._Chunks.backward",
        "dk.add_(dk_out)",
        "dk",
        "delta", "gradient",
    ),
    Mistake(
        "a boundary is a decay of -1e4",
        "kernels.delta_scan.chunked",
        "torch.where(segments.starts()[..., None], 0.0, segments.hold(log_a))",
        "torch.where(segments.starts()[..., None], -1e4, segments.hold(log_a))",
        "gated_delta", "float32_segments",
        also=(("_select(segments, chunk, q.device)", "_select(None, chunk, q.device)"),),
    ),
    Mistake(
        "an earlier segment's decays are summed and subtracted",
        "kernels.delta_scan._running",
        "if keep.ndim == 2",
        "if True",
        "gated_delta", "float32_segments",
    ),
    # the diagonal and the selective scan
    Mistake(
        "a channel's state passes a boundary",
        "kernels.diagonal_scan._prepare",
        "torch.where(first, 0.0, segments.hold(a, 1.0))",
        "segments.hold(a, 1.0)",
        "hgrn", "packing",
    ),
    Mistake(
        "a hold decays a channel's state",
        "kernels.diagonal_scan._prepare",
        "segments.hold(a, 1.0)",
        "segments.hold(a, 0.5)",
        "hgrn", "padding",
    ),
    Mistake(
        "a complex gradient is not conjugated",
        "kernels.diagonal_scan._gradients",
        "a = a.conj().resolve_conj()",
        "pass",
        "hgrn", "gradient",
    ),
    Mistake(
        "the write forgets its step size",
        "kernels.selective_scan.step",
        'held = dt[..., None] if discretise == "euler"',
        'held = torch.ones_like(dt)[..., None] if discretise == "euler"',
        "mamba", "forms_agree",
    ),
    Mistake(
        "a selective state passes a boundary",
        "kernels.selective_scan.parallel",
        "torch.where(segments.starts()[..., None, None], 0.0, a)",
        "a",
        "mamba", "packing",
    ),
    # the long convolution of a state space
    Mistake(
        "a hold decays the state",
        "core.scan.scan",
        "state = _where(segments.real[:, t], state, before)",
        "pass",
        "s4d", "padding",
    ),
    Mistake(
        "a factor 2 is missing for the conjugate poles",
        "kernels.long_conv.step",
        "2 * (c * h)",
        "(c * h)",
        "s4d", "forms_agree",
    ),
    Mistake(
        "the transform is not padded and wraps around",
        "kernels.long_conv._fft",
        "_smooth(2 * tokens)",
        "tokens",
        "s4d", "future",
    ),
    Mistake(
        "what is read of a state is one power late",
        "kernels.long_conv._readout",
        "c * _exp(log_a, 1)",
        "c",
        "s4d", "resume",
    ),
    # softmax attention
    Mistake(
        "a query sees the next key",
        "kernels.softmax.Pattern.sees",
        "else j <= i)",
        "else j <= i + 1)",
        "softmax", "future",
    ),
    Mistake(
        "a window is one too wide",
        "kernels.softmax.Pattern.sees",
        "keep & (i - j < self.window)",
        "keep & (i - j <= self.window)",
        "softmax-window", "step_by_step",
    ),
    Mistake(
        "samples of one row see each other",
        "kernels.softmax.Pattern.sees",
        "queries.run[:, :, None] == keys.run[:, None, :]",
        "queries.run[:, :, None] >= keys.run[:, None, :]",
        "softmax", "packing",
    ),
    Mistake(
        "pads are keys like any other",
        "kernels.softmax.Pattern.sees",
        "keep if keys.real is None else",
        "keep if True else",
        "softmax", "padding",
    ),
    Mistake(
        "positions begin anew in each call",
        "mixers.softmax.SoftmaxAttentionLayer.mix",
        "if fresh else place.positions",
        "if place.segments is None else place.positions",
        "softmax", "resume",
    ),
    Mistake(
        "positions go on across a boundary",
        "core.segments.resolve",
        "torch.where(run > 0, count - 1 - base, track.position[:, None] + count - 1)",
        "track.position[:, None] + count - 1",
        "softmax", "packing",
    ),
    Mistake(
        "a ring is read as if it had not wrapped",
        "mixers.softmax.SoftmaxAttentionLayer._read",
        "rank = last - (last - slot) % size",
        "rank = slot.expand_as(last - slot)",
        "softmax-window", "step_by_step",
    ),
    Mistake(
        "the rotation's gradient turns the wrong way",
        "parts.positions._TurnSplit.backward",
        "_turn_into(dx[:, :, :heads], dq, cos, -sin)",
        "_turn_into(dx[:, :, :heads], dq, cos, sin)",
        "softmax", "gradient",
    ),
    Mistake(
        "the softmax forgets to rescale what it has summed",
        "kernels.softmax._Online.forward",
        "keep * total[..., rows] + score.sum(-1)",
        "total[..., rows] + score.sum(-1)",
        "softmax", "long",
    ),
]


def test_there_are_enough_and_each_is_its_own():
    assert len(MISTAKES) >= 12 and len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)


@functools.cache
def holds_without(law: str, case: str) -> bool:
    return apply(LAWS[law], CASES[case]).verdict == "pass"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what.replace(" ", "_"))
def test_a_planted_mistake_turns_its_law_red(mistake):
    law, case = LAWS[mistake.law], CASES[mistake.case]
    assert holds_without(mistake.law, mistake.case), f"{mistake.law} is red on {mistake.case} without any mistake"
    with planted(mistake):
        result = apply(law, case)
    assert result.verdict == "fail", f"{mistake.what} went unnoticed: {result}"
    assert result.value is not None, f"{mistake.what} broke the code instead of its result: {result}"

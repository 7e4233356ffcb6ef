"""Gated slots, and slots beside a window: their two limits, softmax attention and each other, and what a slot holds."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from seqloom.core import BuildContext, is_exact, use_form
from seqloom.kernels import decay_scan, softmax
from seqloom.laws.exact import layer_of
from seqloom.mixers import GatedSlotAttention, NativeHybridAttention, SoftmaxAttention, gated_slot
from seqloom.mixers.gated_slot import Slots
from seqloom.mixers.native_hybrid import FORMS as HYBRID


def _streams(tokens: int, slots: int, *, batch: int = 2, heads: int = 2, key: int = 6, value: int = 5,
             logit: float = 0.0) -> list[Tensor]:
    """q, k, v and log sigmoid of normal gates around `logit`."""
    make = torch.Generator().manual_seed(0)
    rand = lambda width: torch.randn(batch, tokens, heads, width, generator=make, dtype=torch.float64)  # noqa: E731
    return [rand(key), rand(key), rand(value), torch.nn.functional.logsigmoid(logit + rand(slots))]


def _empty(k: Tensor, v: Tensor, log_a: Tensor) -> Slots:
    batch, _, heads, slots = log_a.shape
    return Slots(k.new_zeros(batch, heads, k.shape[-1], slots), v.new_zeros(batch, heads, slots, v.shape[-1]))


def strong_gates(*, tokens: int = 512, slots: int = 8, logit: float = -50.0) -> float:
    """Deviation of the chunked form from the recurrence at gate logits near -50 and tau = 1, gradients included: NaN or
    infinity, if any, is returned as infinity ([gated-slot-attention] Works when 2)."""
    worst, results = 0.0, []
    for form in ("recurrent", "chunked"):
        streams = [x.requires_grad_() for x in _streams(tokens, slots, logit=logit)]
        y, state, _ = gated_slot.FORMS[form](*streams, state=_empty(*(x.detach() for x in streams[1:])))
        results.append([y, *state, *torch.autograd.grad(y.square().sum(), streams)])
    for want, got in zip(*results, strict=True):
        gap = (want - got).detach().abs().max()
        worst = max(worst, float(gap) if torch.isfinite(gap) else float("inf"))
    return worst


def convex(*, tokens: int = 70, slots: int = 8) -> float:
    """Deviation of a slot's weights, summed over the tokens it holds, from 1 - prod a ([gated-slot-attention] Works when 3)."""
    q, k, v, log_a = _streams(tokens, slots)
    ones = torch.ones_like(v[..., :1])
    state = gated_slot.FORMS["chunked"](q, k, ones, log_a, state=_empty(k, ones, log_a)).state
    return float((state.values[..., 0] + log_a.sum(1).expm1()).abs().max())


def one_hot_is_softmax(*, tokens: int = 20, masked: bool = True) -> float:
    """Deviation from softmax attention where slot t is written by token t alone, with slots not written yet masked: with as
    many slots as tokens nothing is forgotten ([gated-slot-attention] Works when 4). Without the mask they take their share.
    """
    q, k, v, _ = _streams(tokens, tokens)
    own = torch.eye(tokens, dtype=torch.bool)
    log_a = torch.where(own, -torch.inf, 0.0).double()[None, :, None].expand(2, -1, 2, -1)
    unwritten = own.logical_not().tril().logical_not() & ~own
    scale = q.shape[-1] ** -0.5

    def weigh(found: Tensor) -> Tensor:
        found = scale * found
        return (found.masked_fill(unwritten[None, :, None], -torch.inf) if masked else found).softmax(-1)

    got = gated_slot.passes(decay_scan.chunked, q, k, v, log_a, weigh, state=_empty(k, v, log_a)).y
    want = softmax.matrix(q, k, v, pattern=softmax.Pattern()).y
    return float((got - want).abs().max())


def half_life(*, tau: float = 8.0) -> float:
    """Deviation of a slot's decay over tau tokens from 1/2 where the gate's input is 0 ([gated-slot-attention] Traps 1)."""
    layer = GatedSlotAttention(heads=2, slots=4, tau=tau).build(BuildContext(dim=8)).double()
    x = torch.zeros(1, round(tau), 8, dtype=torch.float64)
    return float((layer._log_decay(x).detach().sum(1).exp() - 0.5).abs().max())


def first_axis(*, axis: str = "value", tokens: int = 70) -> float:
    """Deviation from the recurrence where the first pass decays on `axis`: it is the value axis
    ([gated-slot-attention] Traps 4). As many slots as key channels, so that either is possible."""
    streams = _streams(tokens, 6)
    state = _empty(*streams[1:])

    def form(*given: Tensor, state: Tensor, segments: None, axis: str = "key") -> tuple:
        return decay_scan.chunked(*given, state=state, axis=first if axis == "value" else axis)

    first = axis
    got = gated_slot.passes(form, *streams, lambda found: found.softmax(-1), state=state).y
    return float((got - gated_slot.recurrent(*streams, state=state).y).abs().max())


# Slots beside a window ------------------------------------------------------------------------------------------------

def wide_window_is_softmax(*, tokens: int = 70, unwritten: str = "mask") -> float:
    """Deviation from softmax attention with the same weights where the window holds all tokens
    ([native-hybrid-attention] Works when 1). Slots that act as sinks take their share."""
    spec = NativeHybridAttention(heads=4, kv_heads=2, slots=8, window=tokens, unwritten=unwritten)
    layer = layer_of(spec, 32)
    plain = SoftmaxAttention(heads=4, kv_heads=2).build(BuildContext(dim=32)).double()
    plain.load_state_dict({"qkv.weight": layer.qkv.weight, "out.weight": layer.o_proj.weight})
    return _worst_over_forms(layer, plain, tokens)


def no_window_is_slots(*, tokens: int = 70) -> float:
    """Deviation from gated slot attention with the same weights and scale where there is no window
    ([native-hybrid-attention] Works when 2)."""
    shared = dict(heads=4, kv_heads=2, slots=8, feature="silu", norm="rms", scale=None)
    layer = layer_of(NativeHybridAttention(window=0, **shared), 32)
    plain = GatedSlotAttention(**shared).build(BuildContext(dim=32)).double()
    plain.load_state_dict(layer.state_dict())
    return _worst_over_forms(layer, plain, tokens)


def _worst_over_forms(layer: torch.nn.Module, plain: torch.nn.Module, tokens: int) -> float:
    x, worst = torch.randn(2, tokens, 32, dtype=torch.float64), 0.0
    with torch.no_grad():
        want = plain(x).y
        for form in (name for name, function in HYBRID.items() if is_exact(function)):
            with use_form(native_hybrid=form):
                worst = max(worst, float((layer(x).y - want).abs().max()))
    return worst


def one_path(*, tokens: int = 24, window: int = 5, slots: int = 8) -> float:
    """Largest trace of a token in the memory it should not be in: in the slots while it is in the window, in the window after.

    Token s has value e_s, so that slots and output say how much of which token they hold: those of the window are not in
    the slots, the newest that has left is, and the output's weights are at least 0 and sum to at most 1, to 1 while nothing
    has left ([native-hybrid-attention] Works when 4).
    """
    q, k, _, log_a = _streams(tokens, slots, value=1)
    v = torch.eye(tokens, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    how = dict(window=window, scale=0.4, unwritten="mask", rope=None)
    worst = 0.0
    for t in range(tokens):
        y, cells, _ = HYBRID["chunked"](*(x[:, : t + 1] for x in (q, k, v, log_a)), state=None, **how)
        held, read = cells.slots.values, y[:, -1]
        gone = max(t - window + 1, 0)
        worst = max(worst, float(held[..., gone:].abs().max()), float((read.sum(-1) - 1).max()), float(-read.min()))
        worst = max(worst, float((cells.ring.values.sum(1) - v[:, gone : t + 1].sum(1)).abs().max()))
        if gone == 0:
            worst = max(worst, float((read.sum(-1) - 1).abs().max()))
        elif float(held[..., gone - 1].min()) <= 0:  # dropped between the two
            return float("inf")
    return worst


def window_changes_no_parameter(*, windows: tuple[int, ...] = (0, 1, 8, 64)) -> float:
    """Names or shapes of parameters that differ between windows ([native-hybrid-attention] Works when 5)."""
    spec = NativeHybridAttention(heads=2, slots=8)
    shapes = [{name: tuple(value.shape) for name, value in replace(spec, window=window).build(BuildContext(dim=32))
               .state_dict().items()} for window in windows]
    return float(sum(len(shapes[0].items() ^ other.items()) for other in shapes[1:]))


def off_by_one(*, tokens: int = 24, window: int = 5) -> float:
    """How much the output moves if a token leaves the window one step late: by more than a rounding error, so that the
    agreement of the forms tells the two apart ([native-hybrid-attention] Traps 3)."""
    layer = layer_of(NativeHybridAttention(heads=2, slots=8, window=window), 32)
    late = copy.deepcopy(layer)
    late.spec = replace(layer.spec, window=window + 1)
    x = torch.randn(2, tokens, 32, dtype=torch.float64)
    with torch.no_grad():
        return float((layer(x).y - late(x).y).abs().max())

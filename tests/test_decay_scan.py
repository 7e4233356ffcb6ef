"""The decay scan on its own: forms against the definition, shared queries and keys, hard decays in float32, memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from seqloom.core import scan
from seqloom.core.segments import Track, resolve
from seqloom.kernels import decay_scan

recurrent = partial(scan, decay_scan.step)
DECAYS = {
    "none": lambda *shape: None,
    "head": lambda b, t, h, k: -torch.rand(b, t, h, dtype=torch.float64),
    "channel": lambda b, t, h, k: -torch.rand(b, t, h, k, dtype=torch.float64) ** 4 * 30,
    "value": lambda b, t, h, v: -torch.rand(b, t, h, v, dtype=torch.float64) ** 4 * 30,
}
VALUE = {
    "recurrent": partial(scan, partial(decay_scan.step, axis="value")),
    **{name: partial(getattr(decay_scan, name), axis="value") for name in ("parallel", "chunked", "bidirectional")},
}
KEY = {"recurrent": recurrent, **{name: getattr(decay_scan, name) for name in ("parallel", "chunked", "bidirectional")}}


def forms(decay):
    return VALUE if decay == "value" else KEY


def streams(decay, groups, heads, tokens, batch=3, key=4, value=5):
    q, k = (torch.randn(batch, tokens, groups, key, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value, dtype=torch.float64)
    log_a = DECAYS[decay](batch, tokens, heads, value if decay == "value" else key)
    return [q, k, v] + ([] if log_a is None else [log_a]), torch.randn(batch, heads, key, value, dtype=torch.float64)


def outputs_and_gradients(form, given, state, **options):
    leaves = [x.clone().requires_grad_() for x in (*given, state)]
    y, new, _ = form(*leaves[:-1], state=leaves[-1], **options)
    weights = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=weights, dtype=x.dtype)).sum() for x in (y, new) if x is not None)
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [y, new, *(torch.zeros_like(x) if slope is None else slope for slope, x in zip(slopes, leaves, strict=True))]


def assert_same(got, want, limit=1e-12):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= limit * b.detach().abs().max().clamp(min=1e-3)


def packed(tokens):
    """Three rows that go on, start and are reset; pads left, inside and at the end; boundaries at and beside edges of 4."""
    rows = torch.tensor([[0, 1, 1, 2, 2, 2, 2, 3], [1, 0, 0, 1, 1, 1, 1, 1], [4, 4, 4, 4, 5, 6, 6, 0]])
    ids = rows.repeat(1, -(-tokens // 8))[:, :tokens]
    return resolve(ids, Track(torch.tensor([1, 0, 2]), torch.zeros(3, dtype=torch.int64)))[0]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("groups", "heads"), [(2, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_forms_agree_with_the_definition(decay, groups, heads, tokens):
    """Outputs, final state and all gradients, with a state, with and without segments; groups of heads share q and k."""
    given, state = streams(decay, groups, heads, tokens)
    for segments in (None, packed(tokens)):
        want = outputs_and_gradients(forms(decay)["recurrent"], given, state, segments=segments)
        for form in (forms(decay)["parallel"], forms(decay)["chunked"], partial(forms(decay)["chunked"], chunk=4)):
            assert_same(outputs_and_gradients(form, given, state, segments=segments), want)


@pytest.mark.parametrize("decay", DECAYS)
def test_states_over_more_chunks_than_one_span(decay, monkeypatch):
    """Spans of 3 chunks of 2 tokens: 35 chunks take three levels, with a rest at each."""
    monkeypatch.setattr(decay_scan, "SPAN", 3)
    given, state = streams(decay, 1, 2, 70)
    want = outputs_and_gradients(forms(decay)["recurrent"], given, state)
    assert_same(outputs_and_gradients(partial(forms(decay)["chunked"], chunk=2), given, state), want)


@pytest.mark.parametrize("decay", DECAYS)
def test_both_directions_by_loops(decay):
    """y_i = sum_j (q_i' M_ij k_j) v_j, M_ij the product of the decays from j to i, on the side of the query; decays on the
    value axis multiply v_j instead."""
    given, _ = streams(decay, 2, 2, 9, batch=1)
    q, k, v = (x[0] for x in given[:3])
    log_a = given[3][0] if len(given) > 3 else torch.zeros(9, 2, dtype=q.dtype)
    log_a = log_a if log_a.ndim == 3 else log_a[..., None].expand_as(v if decay == "value" else q)
    want = torch.zeros_like(v)
    for i in range(9):
        for j in range(9):
            between = log_a[j + 1 : i + 1] if j <= i else log_a[i:j]
            weight = between.sum(0).exp()
            key, value = (1.0, weight) if decay == "value" else (weight, 1.0)
            want[i] += (q[i] * key * k[j]).sum(-1, keepdim=True) * value * v[j]
    for form in (partial(forms(decay)["parallel"], bidirectional=True), partial(forms(decay)["bidirectional"], chunk=4)):
        assert_same([form(*given).y[0]], [want])


HARD = {
    "near 1": lambda x: -1e-4 * x,
    "near 0": lambda x: -50 * x,
    "both": lambda x: torch.where(x < 0.3, -50.0, -1e-4),
    "exactly 0": lambda x: torch.where(x < 0.1, -torch.inf, -1e-3),
}


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize(("decay", "channels"), [("head", ()), ("channel", (8,)), ("value", (8,))],
                         ids=["head", "channel", "value"])
def test_hard_decays_in_float32(hard, decay, channels):
    """Chunks err no more than twice the recurrence in float32, and 5e-7: running sums of mixed decays would lose 1e-4."""
    log_a = HARD[hard](torch.rand(2, 200, 2, *channels))
    given = [*(torch.randn(2, 200, 2, 8) for _ in range(3)), log_a]
    state = torch.randn(2, 2, 8, 8)
    recurrent, chunked = forms(decay)["recurrent"], forms(decay)["chunked"]
    exact = outputs_and_gradients(recurrent, [x.double() for x in given], state.double())
    errors = []
    for form in (recurrent, chunked):
        got = outputs_and_gradients(form, given, state)
        errors.append([((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(got, exact, strict=True)])
    for plain, fast in zip(*errors, strict=True):
        assert fast <= 2 * plain + 5e-7


@pytest.mark.parametrize("decay", DECAYS)
def test_memory_of_training_is_linear_and_holds_no_scores(decay):
    def kept(tokens):
        given, state = streams(decay, 1, 2, tokens, batch=1, key=8, value=8)
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            forms(decay)["chunked"](*(x.requires_grad_() for x in given), state=state)
        return sum(sizes.values())

    assert kept(2048) <= 2.05 * kept(1024)
    scores = 1024 * 64 * 2 * 8  # bytes of one [T, C] matrix per head in float64
    assert kept(1024) < scores


def test_a_constant_decay_needs_no_gradient():
    given, state = streams("head", 1, 2, 20)
    leaves = [x.requires_grad_() for x in given[:3]]
    decay_scan.chunked(*leaves, given[3], state=state).y.sum().backward()
    assert given[3].grad is None and all(leaf.grad.abs().max() > 0 for leaf in leaves)


def test_groups_that_do_not_divide_the_heads_are_refused():
    given, state = streams("head", 2, 3, 4)
    for form in (recurrent, decay_scan.chunked, decay_scan.parallel):
        with pytest.raises(ValueError, match="2 heads of queries and keys cannot be shared by 3 heads of values"):
            form(*given, state=state)


def test_an_axis_or_a_number_of_channels_that_does_not_fit_is_refused():
    given, state = streams("channel", 2, 2, 4)
    for form in (decay_scan.chunked, decay_scan.parallel):
        with pytest.raises(ValueError, match="not 'slot'"):
            form(*given, state=state, axis="slot")
        with pytest.raises(ValueError, match="value axis need 5 channels, found 4"):
            form(*given, state=state, axis="value")

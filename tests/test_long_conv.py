"""The long convolution and the state spaces that make its kernels, against NumPy loops, closed forms and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from seqloom.core import BuildContext, Segments, Track, use_form
from seqloom.core.segments import resolve
from seqloom.kernels import long_conv
from seqloom.mixers.s4d import S4D
from seqloom.parts.ssm import discretise, hippo_legs, initial_poles, nplr_legs


def segments_of(*rows: str) -> Segments:
    """One letter a token; a dot is a pad."""
    ids = torch.tensor([[0 if c == "." else ord(c) for c in row] for row in rows])
    return resolve(ids, Track.start(len(rows)))[0]


def loop(u, log_a, b, c, h):
    """The recurrence of [s4d] Method 5 for one row and channel, in NumPy: outputs and the last state."""
    y = []
    for value in u:
        h = np.exp(log_a) * h + b * value
        y.append(2 * (c * h).sum().real)
    return np.array(y), h


def system(method="zoh", init="inv", channels=3, state=8, dt=(1e-3, 1e-2, 1e-1)):
    torch.manual_seed(1)
    log_a, b = discretise(torch.complex(*initial_poles(init, state, channels)), torch.tensor(dt, dtype=torch.float64), method)
    return log_a, b, torch.randn(channels, state // 2, dtype=torch.complex128)


# Discretisation and poles -------------------------------------------------------------------------------------------

def test_hippo_legs_is_normal_plus_low_rank():
    A, B = hippo_legs(64)
    split = nplr_legs(64)
    p = np.sqrt(np.arange(64) + 0.5)
    normal = A + np.outer(p, p)
    np.testing.assert_allclose(normal + normal.T, -np.eye(64), atol=1e-12)
    back = split.V @ (np.diag(split.poles) - np.outer(split.P, split.P.conj())) @ split.V.conj().T
    np.testing.assert_allclose(back, A, atol=1e-8)
    np.testing.assert_allclose(split.V @ split.b, B, atol=1e-10)
    np.testing.assert_allclose(split.poles.imag[[0, 1, 2, 3, 30, 31]], [0.26, 0.91, 1.70, 2.63, 433, 1303], rtol=2e-2)


def test_largest_frequencies_are_those_of_the_paper():
    n = 64
    largest = {init: float(initial_poles(init, n, 1)[1].max()) for init in ("lin", "inv", "real")}
    assert largest["lin"] == pytest.approx(math.pi * (n / 2 - 1)) and largest["real"] == 0
    assert largest["inv"] == pytest.approx(n * n / math.pi, rel=0.02)
    assert_close(initial_poles("inv", n, 2)[1][0, :2], torch.tensor([1283.43, 414.23], dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_discretisation_is_the_formula_and_keeps_its_digits(dtype):
    poles = torch.tensor([[-0.5 + 3j, -1e-6 + 1e-6j, -20 + 0j]], dtype=torch.complex128)
    dt = torch.tensor([1e-3], dtype=torch.float64)
    x, real = (dt * poles).numpy(), dtype.to_real()
    log_a, gain = discretise(poles.to(dtype), dt.to(real), "zoh")
    series = dt.numpy() * (1 + x / 2 + x**2 / 6 + x**3 / 24 + x**4 / 120)  # (exp(x) - 1) / A
    tight = 1e-6 if dtype == torch.complex64 else 1e-11
    np.testing.assert_allclose(log_a.exp().numpy(), np.exp(x), rtol=tight)
    np.testing.assert_allclose(gain.numpy(), series, rtol=tight)
    log_a, gain = discretise(poles.to(dtype), dt.to(real), "bilinear")
    np.testing.assert_allclose(log_a.exp().numpy(), (1 + x / 2) / (1 - x / 2), rtol=tight)
    np.testing.assert_allclose(gain.numpy(), dt.numpy() / (1 - x / 2), rtol=tight)


def test_bilinear_pole_at_zero_is_finite():
    """A real pole at -2 / dt has Abar = 0: an echo of one token, values and gradients finite."""
    poles = torch.tensor([[-20 + 0j, -30 + 0j]], dtype=torch.complex128, requires_grad=True)
    log_a, b = discretise(poles, torch.tensor([0.1], dtype=torch.float64), "bilinear")
    u = torch.randn(1, 9, 1, dtype=torch.float64)
    every = (long_conv.recurrent, long_conv.chunked, long_conv.parallel)
    forms = [form(u, log_a=log_a, b=b, c=torch.ones_like(b)) for form in every]
    for form in forms[1:]:
        assert_close(form.y, forms[0].y)
        assert_close(form.state, forms[0].state)
    (gradient,) = torch.autograd.grad(forms[2].y.sum(), poles)
    assert gradient.isfinite().all()


# A diagonal state space ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real", "rand", "inv2", "quad"])
def test_every_form_is_the_loop(init, method):
    log_a, b, c = system(method, init)
    u = torch.randn(2, 131, 3, dtype=torch.float64)
    start = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    for form in (long_conv.recurrent, long_conv.chunked, long_conv.parallel):
        y, state, _ = form(u, log_a=log_a, b=b, c=c, state=start)
        for row in range(2):
            for d in range(3):
                want, last = loop(u[row, :, d].numpy(), log_a[d].numpy(), b[d].numpy(), c[d].numpy(),
                                  torch.view_as_complex(start)[row, d].numpy())
                np.testing.assert_allclose(y[row, :, d].numpy(), want, rtol=0, atol=1e-10 * np.abs(want).max())
                got = torch.view_as_complex(state.contiguous())[row, d].numpy()
                np.testing.assert_allclose(got, last, rtol=0, atol=1e-10 * np.abs(last).max())


@pytest.mark.parametrize("tokens", [1, 2, 16, 65, 300])
def test_kernel_is_the_vandermonde_product(tokens):
    log_a, b, c = system()
    powers = np.exp(log_a.numpy()[..., None] * np.arange(tokens))
    want = 2 * ((b * c).numpy()[..., None] * powers).sum(1).real
    np.testing.assert_allclose(long_conv.kernel(tokens, log_a=log_a, b=b, c=c).numpy(), want, atol=1e-13)


def test_long_sequences_keep_their_digits_in_float32():
    exact = system("zoh", "lin", dt=(1e-3, 1e-2, 1e-1), state=64)
    u = torch.randn(1, 16384, 3, dtype=torch.float64)
    want = long_conv.parallel(u, log_a=exact[0], b=exact[1], c=exact[2])
    log_a, b, c = (x.to(torch.complex64) for x in exact)
    for form in (long_conv.chunked, long_conv.parallel):
        y, state, _ = form(u.float(), log_a=log_a, b=b, c=c)
        scale = want.y.abs().amax(1, keepdim=True)
        assert ((y - want.y).abs() / scale).max() < 2e-4, form
        assert ((state - want.state).abs().amax((2, 3)) / want.state.abs().amax((2, 3))).max() < 2e-4, form


def test_the_second_direction_starts_one_token_away():
    log_a, b, c = system()
    c = torch.stack([c, torch.randn_like(c)])
    u = torch.randn(1, 70, 3, dtype=torch.float64)
    k, back = (long_conv.kernel(70, log_a=log_a, b=b, c=side).numpy() for side in c)
    want = np.zeros((70, 3))
    for d in range(3):
        for t in range(70):
            want[t, d] = sum((k[d, t - s] if s <= t else back[d, s - t - 1]) * u[0, s, d].item() for s in range(70))
    for form in (long_conv.matrix, long_conv.chunked_bidirectional, long_conv.parallel_bidirectional):
        np.testing.assert_allclose(form(u, log_a=log_a, b=b, c=c).y[0].numpy(), want, atol=1e-12)


# A given kernel -----------------------------------------------------------------------------------------------------

ROWS = ("aaaabbbbbbbbbbbbbbbbb..bbbbcd", "...aaa.aa.aaaaaaaaaaaaaaaaaaa", "." * 29, "abababababcccccccccccccccccc.")


@pytest.mark.parametrize("length", [1, 5, 29, 40])
@pytest.mark.parametrize("both", [False, True])
def test_convolve_is_its_matrix(length, both):
    u = torch.randn(4, 29, 2, dtype=torch.float64)
    k, back = (torch.randn(2, length, dtype=torch.float64, requires_grad=True) for _ in range(2))
    back = back if both else None
    leaves = [k, back] if both else [k]
    for segments in (None, segments_of(*ROWS)):
        held = u if segments is None else segments.hold(u, float("nan"))
        x = held.clone().requires_grad_()
        y = long_conv.convolve(x, k, back=back, segments=segments)
        clean = u.clone().requires_grad_()
        weight = long_conv.toeplitz(k, 29, back=back, segments=segments)
        real = clean if segments is None else segments.hold(clean)
        want = torch.einsum("bdij,bjd->bid", weight.expand(4, -1, -1, -1), real)
        assert_close(y, want)
        target = torch.randn_like(y)
        got = torch.autograd.grad((y * target).sum(), [x, *leaves])
        assert_close(got, torch.autograd.grad((want * target).sum(), [clean, *leaves]))


@pytest.mark.parametrize("length", [9, 24, 30])
@pytest.mark.parametrize("both", [False, True])
def test_many_short_rows_are_convolved_by_a_product(both, length):
    shapes = [(40, 24, 3), *[(3, length)] * (1 + both)]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    u, k, back = leaves if both else (*leaves, None)
    target = torch.randn(40, 24, 3, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = long_conv.convolve(u, k, back=back)
        got = torch.autograd.grad((y * target).sum(), leaves)
    assert not any("fft" in event.key for event in profile.key_averages())
    want = torch.einsum("bdij,bjd->bid", long_conv.toeplitz(k, 24, back=back).expand(40, -1, -1, -1), u)
    assert_close(y, want)
    assert_close(got, torch.autograd.grad((want * target).sum(), leaves))


@pytest.mark.parametrize("tokens", [29, 100, 200])
def test_fixed_shapes_give_the_same(tokens):
    """What compiled code takes: halves joined pairwise."""
    rows = [(row * 8)[:tokens] for row in ROWS]
    segments = segments_of(*rows)
    u, k = torch.randn(4, tokens, 2, dtype=torch.float64), torch.randn(2, tokens, dtype=torch.float64)
    want = long_conv.convolve(u, k, segments=segments)
    assert_close(long_conv._by_halves(segments.hold(u), k, segments), want)


def test_a_loud_segment_leaves_no_trace_in_float32():
    segments = segments_of("a" * 37 + "b" * 64 + "c" * 40)
    u, k = torch.randn(1, 141, 4), torch.randn(4, 141)
    loud = torch.where((segments.run == 1)[..., None], u, 1e6 * u)
    for form in (long_conv.convolve, lambda u, k, segments: long_conv._by_halves(u, k, segments)):
        quiet = form(u, k, segments=segments)[:, 37:101]
        assert_close(form(loud, k, segments=segments)[:, 37:101], quiet, rtol=0, atol=1e-5)


def test_a_transform_of_length_T_would_wrap_around(monkeypatch):
    u, k = torch.zeros(1, 32, 1, dtype=torch.float64), torch.ones(1, 32, dtype=torch.float64)
    u[:, 20] = 1
    assert long_conv.convolve(u, k)[:, :20].abs().max() < 1e-12
    monkeypatch.setattr(long_conv, "_smooth", lambda size: size // 2)
    assert long_conv.convolve(u, k)[:, :20].abs().max() > 0.9


def test_smooth_sizes():
    for size in (2, 7, 62, 258, 2 * 4099, 2 * 16383):
        found = long_conv._smooth(size)
        rest = found
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert size <= found <= 1.3 * size + 2 and rest == 1 and found % 2 == 0


# The layer ----------------------------------------------------------------------------------------------------------

def test_doubling_the_rate_reads_every_second_sample():
    """[s4d] Works when 4: a smooth signal with every second sample left out, read at twice the step."""
    torch.manual_seed(0)
    at = torch.arange(512, dtype=torch.float64)
    signal = torch.stack([torch.sin(2 * math.pi * at * f / 512) for f in (1.0, 2.0, 3.5)], -1)[None]
    build = lambda rate: S4D(state=16, output="none", rate=rate).build(BuildContext(dim=3)).double()  # noqa: E731
    slow, fast = build(1.0), build(2.0)
    fast.load_state_dict(slow.state_dict())
    with torch.no_grad():
        want, got = slow(signal).y[:, ::2], fast(signal[:, ::2]).y
        same = slow(signal[:, ::2]).y
    error = lambda y: float((y - want).norm() / want.norm())  # noqa: E731
    assert error(got) < 0.05 < error(same)


def test_parameters_and_what_is_marked():
    from seqloom.core.marks import marks

    layer = S4D(state=16, lr_scale=0.1, B="trained").build(BuildContext(dim=8))
    own = {name for name, p in layer.named_parameters() if marks(p)["lr_scale"] == 0.1 and marks(p)["no_decay"]}
    assert own == {"log_dt", "log_A_real", "A_imag", "B"}
    kept = {name for name, p in layer.named_parameters() if marks(p)["keep_float32"]}
    assert kept == {*own, "C"}
    assert not any(p.is_complex() for p in layer.parameters())
    assert "A_imag" not in dict(S4D(init="real").build(BuildContext(dim=8)).named_parameters())
    assert "A_imag" in dict(S4D(init="real", imaginary="trained").build(BuildContext(dim=8)).named_parameters())


def test_frozen_B_is_folded_into_C():
    """LegS' own B scales C at the start where B is not a parameter: the same kernels are drawn either way."""
    layers = []
    for B in ("one", "trained"):
        torch.manual_seed(0)
        layers.append(S4D(state=16, init="legs", B=B, output="none").build(BuildContext(dim=4)))
    x = torch.randn(1, 50, 4)
    assert_close(layers[0](x).y, layers[1](x).y)


def test_forms_agree_in_a_bidirectional_stack_of_segments():
    layer = S4D(state=8, direction="bidirectional").build(BuildContext(dim=4)).double()
    x = torch.randn(4, 29, 4, dtype=torch.float64)
    from seqloom.core import Info

    ids = torch.tensor([[0 if c == "." else ord(c) for c in row] for row in ROWS])
    seen = []
    for form in ("matrix", "chunked", "parallel"):
        with use_form(form):
            seen.append(layer(x, info=Info(segments=ids)).y)
    assert_close(seen[1], seen[0])
    assert_close(seen[2], seen[0])


@pytest.mark.parametrize(("settings", "message"), [
    (dict(state=7), "use an even number|must be an even number, such as 6"),
    (dict(state=0), "such as 2"),
    (dict(dt_min=0.0), "no range above 0"),
    (dict(dt_min=1.0, dt_max=0.1), "no range above 0"),
    (dict(rate=0.0), "must be above 0"),
])
def test_bad_settings_say_what_works(settings, message):
    with pytest.raises(ValueError, match=message):
        S4D(**settings)


def test_unknown_names_say_what_is_known():
    with pytest.raises(ValueError, match="known: lin, inv"):
        initial_poles("fourier", 8, 1)
    with pytest.raises(ValueError, match="known: zoh, bilinear"):
        discretise(torch.ones(1, 1, dtype=torch.complex64), torch.ones(1), "euler")

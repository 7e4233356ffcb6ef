"""The diagonal and the selective scan against loops, attention views and closed forms; what HGRN and Mamba promise."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from seqloom.core import BuildContext, Info, Track, runnable, scan, use_form
from seqloom.core.marks import marks
from seqloom.core.segments import resolve
from seqloom.kernels import diagonal_scan, selective_scan, short_conv
from seqloom.mixers import HGRN, Mamba
from seqloom.models import Block, Stack

EXACT = dict(rtol=0, atol=1e-11)
DIAGONAL = {
    "recurrent": lambda a, b, **options: scan(diagonal_scan.step, a, b, **options),
    "chunked": diagonal_scan.chunked,
    "parallel": diagonal_scan.parallel,
}
SELECTIVE = {"recurrent": selective_scan.recurrent, "chunked": selective_scan.chunked, "parallel": selective_scan.parallel}
if selective_scan.has_native():
    SELECTIVE["native"] = selective_scan.native


def segments_of(tokens: int):
    """Three rows: one sample; samples and pads that change every 20/7 tokens; pads first, then samples of nine tokens."""
    rows = [lambda i: 1, lambda i: i * 7 // 20 % 3, lambda i: 0 if i < tokens // 3 else 1 + i // 9 % 2]
    return resolve(torch.tensor([[row(i) for i in range(tokens)] for row in rows]), Track.start(3))[0]


def watched(form, inputs, **options):
    """Outputs, final state, and the gradients of both under fixed weights."""
    inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y, state, _ = form(**inputs, **options)
    loss = 0.0
    for value in (y, state):
        real = torch.view_as_real(value) if value.is_complex() else value
        loss = loss + (real * torch.linspace(0.5, 1.5, real.numel(), dtype=real.dtype).view(real.shape)).sum()
    return [y, state, *torch.autograd.grad(loss, list(inputs.values()))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 63, 130, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_diagonal_forms_agree(dtype, tokens, packed):
    a, b = torch.randn(3, tokens, 4, dtype=dtype), torch.randn(3, tokens, 4, dtype=dtype)
    inputs = dict(a=a / (a.abs() + 0.2), b=b, state=torch.randn(3, 4, dtype=dtype))
    segments = segments_of(tokens) if packed else None
    want = watched(DIAGONAL["recurrent"], inputs, segments=segments)
    for name in ("chunked", "parallel"):
        for got, right in zip(watched(DIAGONAL[name], inputs, segments=segments), want, strict=True):
            torch.testing.assert_close(got, right, **EXACT)
    if tokens <= 130:
        held = b if segments is None else segments.hold(b)
        h = torch.einsum("bdts,bsd->btd", diagonal_scan.matrix(inputs["a"], segments=segments), held)
        h = h if segments is None else segments.hold(h)
        torch.testing.assert_close(h, diagonal_scan.chunked(inputs["a"], b, segments=segments).y, **EXACT)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 70, 257, 4099])
@pytest.mark.parametrize("reverse", [False, True])
def test_advance_is_the_loop(tokens, reverse):
    decay, h, start = torch.rand(2, tokens, 3), torch.randn(2, tokens, 3), torch.randn(2, 3)
    decay, want, state = decay.double(), h.double().clone(), start.double()
    for t in reversed(range(tokens)) if reverse else range(tokens):
        state = decay[:, t] * state + want[:, t]
        want[:, t] = state
    for whole in (None, lambda split: split(decay).prod(2)):
        got = h.double().clone()
        diagonal_scan.advance(decay, got, start.double(), reverse=reverse, whole=whole)
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 130])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("discretise", ["euler", "zoh"])
def test_selective_forms_agree(tokens, packed, discretise):
    make = partial(torch.randn, dtype=torch.float64)
    inputs = dict(x=make(3, tokens, 6), dt=make(3, tokens, 6).abs() ** 3, B=make(3, tokens, 4), C=make(3, tokens, 4),
                  A=-make(6, 4).abs() - 0.01, D=make(6), state=make(3, 6, 4))
    options = dict(segments=segments_of(tokens) if packed else None, discretise=discretise)
    want = watched(selective_scan.recurrent, inputs, **options)
    forms = {name: form for name, form in SELECTIVE.items() if name != "native" or discretise == "euler"}
    forms |= {f"blocks of {n}": partial(selective_scan.chunked, block=n) for n in (5, 32)}
    for form in forms.values():
        for got, right in zip(watched(form, inputs, **options), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    weights = selective_scan.matrix(*(inputs[k] for k in ("dt", "B", "C")), A=inputs["A"], D=inputs["D"], **options)
    x = inputs["x"] if not packed else options["segments"].hold(inputs["x"])
    y = torch.einsum("bets,bse->bte", weights, x)
    y = options["segments"].hold(y) if packed else y
    fresh = {key: value for key, value in inputs.items() if key != "state"}
    torch.testing.assert_close(selective_scan.chunked(**fresh, **options).y, y, **EXACT)


def streams(tokens: int, dtype=torch.float32):
    make = partial(torch.randn, dtype=dtype)
    A = -torch.arange(1.0, 17.0, dtype=dtype).expand(64, -1).contiguous()
    return dict(x=make(1, tokens, 64), dt=0.1 * make(1, tokens, 64).abs(), B=make(1, tokens, 16), C=make(1, tokens, 16), A=A)


@pytest.mark.parametrize("form", [name for name in SELECTIVE if name in ("chunked", "native")])
def test_selective_scan_keeps_no_state_of_every_token(form):
    kept = []
    inputs = {name: value.requires_grad_() for name, value in streams(512).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        SELECTIVE[form](**inputs).y.sum().backward()
    assert sum(kept) < 4 * 512 * 64, f"{sum(kept) / (512 * 64):.1f} streams are kept; the states of all tokens are 16"


@pytest.mark.parametrize("form", [name for name in SELECTIVE if name in ("chunked", "native")])
def test_selective_scan_in_single_precision(form):
    """At most twice the error of the loop in the same precision, and NaN comes out as NaN."""
    inputs = streams(300, torch.float64)
    exact = watched(selective_scan.recurrent, inputs)
    single = {name: value.float() for name, value in inputs.items()}
    found, loop = watched(SELECTIVE[form], single), watched(selective_scan.recurrent, single)
    for got, plain, right in zip(found, loop, exact, strict=True):
        error, allowed = ((value.double() - right).norm() / right.norm() for value in (got, plain))
        assert error <= 2 * allowed + 1e-7, (error, allowed)
    for name in inputs:
        broken = {**single, name: single[name].clone()}
        broken[name].flatten()[0] = math.nan
        assert SELECTIVE[form](**broken).y.isnan().any(), f"a NaN in {name} is lost"


def test_native_form_is_offered_only_where_it_is_exact():
    assert "native" not in Mamba(discretise="zoh").forms
    assert ("native" in Mamba().forms) == selective_scan.has_native()
    with pytest.raises(ValueError, match="chunked form has"):
        selective_scan.native(**streams(3), discretise="zoh")


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_short_convolution_is_the_librarys(width, tokens):
    make = partial(torch.randn, dtype=torch.float64)
    inputs = dict(x=make(2, tokens, 5), weight=make(5, width), bias=make(5), state=make(2, width - 1, 5))

    def library(x, weight, bias, state):
        line = torch.cat([state, x], 1)
        y = F.conv1d(line.transpose(1, 2), weight[:, None], bias, groups=5).transpose(1, 2)
        return F.silu(y), line[:, tokens:], None

    got = watched(partial(short_conv.parallel, activation="silu"), inputs)
    for value, right in zip(got, watched(library, inputs), strict=True):
        torch.testing.assert_close(value, right, **EXACT)


# HGRN -------------------------------------------------------------------------------------------------------------------

def layer(spec, dim=12, at=1, depth=3):
    built = spec.build(BuildContext(dim=dim, layer=at, depth=depth)).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return built


def test_hgrn_states_are_averages_of_what_was_written():
    """|h_t| <= max_s |c_s| for each channel: the gates sum to 1 and turning keeps lengths. [hgrn] Works when 3."""
    mixer, x = layer(HGRN()), torch.randn(2, 80, 12, dtype=torch.float64)
    decay, write, _ = mixer.gates(x, torch.float64)
    h, _, _ = mixer.spec.forms["chunked"](decay, write, theta=mixer.theta)
    length = lambda pairs: torch.hypot(*pairs.chunk(2, -1))  # noqa: E731
    candidates = length(F.silu(mixer.i_proj(x)))
    assert (length(h) <= candidates.cummax(1).values + 1e-12).all()


def test_hgrn_turning_can_be_absorbed():
    """h_t = e^{i theta t} h'_t, h' of real decay on turned writes. [hgrn] Works when 2."""
    mixer, x = layer(HGRN()), torch.randn(2, 80, 12, dtype=torch.float64)
    decay, write, _ = mixer.gates(x, torch.float64)
    h = torch.complex(*mixer.spec.forms["recurrent"](decay, write, theta=mixer.theta).y.chunk(2, -1))
    turn = torch.polar(torch.ones(80, 12, dtype=torch.float64), torch.arange(80)[:, None] * mixer.theta.detach())
    still = diagonal_scan.chunked(decay, torch.complex(*write.chunk(2, -1)) * turn.conj()).y
    torch.testing.assert_close(h, still * turn, rtol=0, atol=1e-10)


def test_hgrn_without_turning_is_real():
    """theta = 0 and no imaginary input: the real recurrence. [hgrn] Works when 4."""
    decay, write = torch.rand(2, 50, 6, dtype=torch.float64), torch.randn(2, 50, 6, dtype=torch.float64)
    whole = HGRN().forms["chunked"](decay, torch.cat([write, 0 * write], -1), theta=torch.zeros(6, dtype=torch.float64)).y
    real = HGRN(recurrence="real").forms["chunked"](decay, write).y
    torch.testing.assert_close(whole, torch.cat([real, 0 * real], -1), **EXACT)


def test_hgrn_lower_bounds():
    """0 in the first layer, rising, below 1; one matrix for the stack, in its checkpoint once; falling is the reverse."""
    build = lambda kind: Stack(dim=8, blocks=(Block(mixer=HGRN(lower_bounds=kind), mlp=None),) * 4).build()  # noqa: E731
    bounds = {}
    for kind in ("rising", "falling"):
        stack = build(kind)
        name = "shared.hgrn_lower_bounds.logits"
        assert [key for key in stack.state_dict() if "bounds" in key] == [name]
        logits = stack.get_parameter(name)
        assert marks(logits)["no_decay"] and logits.shape == (4, 8)
        with torch.no_grad():
            torch.manual_seed(1)
            logits.normal_()
        mixers = [block.mixer for block in stack.blocks]
        bounds[kind] = torch.stack([mixer._bounds[0](mixer.layer, torch.float64) for mixer in mixers])
    rising = bounds["rising"]
    assert (rising[0] == 0).all() and (rising.diff(dim=0) > 0).all() and (rising < 1).all()
    torch.testing.assert_close(bounds["falling"], rising.flip(0))
    start = [block.mixer._bounds[0](i, torch.float64)[0].item() for i, block in enumerate(build("rising").blocks)]
    assert start == pytest.approx([0, 0.25, 0.5, 0.75])


def test_hgrn_gates_equal_the_log_space_form():
    """log f = logaddexp(log g, log(1 - g) + logsigmoid(z)), also at logits of 50 and without a bound. [hgrn] Works when 5."""
    mixer = HGRN(recurrence="real").build(BuildContext(dim=5, layer=1, depth=2)).double()
    z, near = torch.tensor([-50.0, -3, 0, 3, 50], dtype=torch.float64), dict(rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        mixer.f_proj.weight.zero_()
        mixer.f_proj.bias.copy_(z)
        mixer.i_proj.weight.zero_()
        mixer.i_proj.bias.fill_(2.0)
        mixer._bounds[0].logits.copy_(torch.tensor([[0.3] * 5, [-0.2] * 5]))
        for at in (0, 1):
            mixer.layer = at
            bound = mixer._bounds[0](at, torch.float64)
            log_f = F.logsigmoid(z) if at == 0 else torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(z))
            decay, write, _ = mixer.gates(torch.zeros(1, 1, 5, dtype=torch.float64), torch.float64)
            torch.testing.assert_close(decay[0, 0], log_f.exp(), **near)
            torch.testing.assert_close(write[0, 0], -torch.expm1(log_f) * 2 / (1 + math.exp(-2)), **near)


def test_hgrn_high_layers_remember():
    """Untrained, the last of four layers keeps over 64 steps at least ten decades more than without bounds. Works when 8."""
    kept = {}
    for kind in ("rising", "none"):
        torch.manual_seed(0)
        mixer = HGRN(lower_bounds=kind).build(BuildContext(dim=32, layer=3, depth=4))
        decay, _, _ = mixer.gates(torch.randn(8, 64, 32), torch.float32)
        kept[kind] = decay.log10().sum(1).mean().item()
    assert kept["rising"] > kept["none"] + 10


# Mamba ------------------------------------------------------------------------------------------------------------------

def test_mamba_starts_as_the_paper_says():
    mixer = Mamba().build(BuildContext(dim=64, depth=9))
    assert torch.equal(mixer.A_log.exp().round(), torch.arange(1.0, 17.0).expand(128, -1))
    assert (mixer.D == 1).all() and mixer.dt_proj.weight.shape == (128, 4) and mixer.dt_proj.weight.abs().max() <= 0.5
    dt = F.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 1e-3 - 1e-6 and dt.max() <= 1e-1 + 1e-6
    assert mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(128) / 3
    for name in ("A_log", "D"):
        assert marks(mixer.get_parameter(name))["no_decay"] and marks(mixer.get_parameter(name))["keep_float32"]
    assert marks(mixer.dt_proj.bias)["no_decay"]
    assert F.softplus(Mamba(dt_min=1e-6, dt_max=1e-6).build(BuildContext(dim=8)).dt_proj.bias).min() >= 9e-5


def test_mamba_knockouts_keep_the_parameters():
    count = lambda spec: sum(p.numel() for p in spec.build(BuildContext(dim=32)).parameters())  # noqa: E731
    whole = count(Mamba(state=8))
    for chosen in ((), ("dt",), ("B", "C")):
        assert abs(count(Mamba(state=8, selective=chosen)) / whole - 1) < 0.02


def test_mamba_without_selection_is_a_convolution():
    """Step and maps that no token changes: shifting the input shifts the output. With selection it does not."""
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    later = torch.cat([torch.zeros(1, 7, 16, dtype=torch.float64), x], 1)
    gaps = {}
    for chosen in ((), ("dt", "B", "C")):
        mixer = Mamba(state=4, selective=chosen, conv_bias=False).build(BuildContext(dim=16)).double()
        inner, _ = mixer.in_proj(x).chunk(2, -1)
        shifted, _ = mixer.in_proj(later).chunk(2, -1)

        def core(u, mixer=mixer):
            dt, B, C = mixer._maps(u)
            dt = F.softplus(mixer.dt_proj(dt)).expand(*u.shape)
            return mixer.run(u, dt, B, C, A=-mixer.A_log.exp(), D=mixer.D, state=None, segments=None).y

        moved = core(shifted)[:, 7:] - core(inner)
        scaled = core(2 * inner) - 2 * core(inner)
        gaps[chosen] = max(moved.abs().max().item(), scaled.abs().max().item())
    assert gaps[()] < 1e-12 < 1e-3 < gaps["dt", "B", "C"]


@pytest.mark.parametrize("settings", [dict(selective=("dt", "x")), dict(dt_min=0.1, dt_max=0.01), dict(state=0)])
def test_mamba_says_what_is_wrong(settings):
    with pytest.raises(ValueError, match="Mamba: "):
        Mamba(**settings)


@pytest.mark.peer
def test_mamba_is_transformers_mamba():
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(vocab_size=8, hidden_size=24, num_hidden_layers=1, state_size=5, time_step_rank=3, use_cache=False)
    peer = MambaModel(config).double().eval().layers[0].mixer
    mixer = Mamba(state=5, dt_rank=3).build(BuildContext(dim=24)).double()
    theirs = peer.state_dict()
    mixer.load_state_dict({**theirs, "conv1d.weight": theirs["conv1d.weight"][:, 0]})
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    want = peer(x)
    for form in runnable(mixer.spec.forms, "cpu"):
        with use_form(form):
            torch.testing.assert_close(mixer(x).y, want, rtol=0, atol=1e-10)
    padded = torch.cat([torch.full((2, 3, 24), math.nan, dtype=torch.float64), x], 1)
    ids = torch.tensor([[0] * 3 + [1] * 19] * 2)
    torch.testing.assert_close(mixer(padded, info=Info(segments=ids)).y[:, 3:], want, rtol=0, atol=1e-10)

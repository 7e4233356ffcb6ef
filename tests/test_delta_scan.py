"""The delta-rule scan: what the law suite cannot see from outside (chunk sizes, long products, other people's kernels)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqloom.core import BuildContext, Info, runnable, scan
from seqloom.core.segments import Segments, Track, resolve
from seqloom.kernels import delta_scan
from seqloom.mixers import DeltaNet, DeltaProduct, GatedDeltaNet

BATCH, HEADS, KEY, VALUE = 2, 3, 6, 5
recurrent = partial(scan, delta_scan.step)


def streams(tokens: int, decay: bool, dtype: torch.dtype = torch.float64, heads: int = HEADS) -> list[Tensor]:
    """q, k, v, beta in (0, 2) and, if asked, log decays from mild to violent, one kind a head."""
    q, k = torch.randn(2, BATCH, tokens, heads, KEY, dtype=dtype)
    v, beta = torch.randn(BATCH, tokens, heads, VALUE, dtype=dtype), 2 * torch.rand(BATCH, tokens, heads, dtype=dtype)
    log_a = -torch.rand(BATCH, tokens, heads, dtype=dtype) * torch.tensor([0.01, 1.0, 8.0], dtype=dtype)[:heads]
    return [q, F.normalize(k + 0.5, dim=-1), v, beta] + [log_a] * decay


def pattern(tokens: int) -> Segments:
    """Boundaries at and beside the edges of chunks of 4 and 16, pads left, inside and right; the first row goes on."""
    ids = torch.ones(BATCH, tokens, dtype=torch.int64)
    for start in (3, 4, 5, 15, 16, 17, 33, 64):
        ids[0, start:] += 1
    ids[1, :2], ids[1, 7:13], ids[1, 13:], ids[1, max(tokens - 3, 14):] = 0, 0, 2, 0
    return resolve(ids, Track(torch.tensor([1, 9]), torch.tensor([3, 3])))[0]


def everything(form, inputs: list[Tensor], state: Tensor, segments: Segments | None, **options) -> list[Tensor]:
    """y, the final state and the gradients of all streams and of the state, under fixed random cotangents."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    y, new, _ = form(*leaves[:-1], state=leaves[-1], segments=segments, **options)
    draw = torch.Generator().manual_seed(1)
    weigh = lambda x: (x * torch.randn(x.shape, generator=draw, dtype=x.dtype)).sum()  # noqa: E731
    return [y, new, *torch.autograd.grad(weigh(y) + weigh(new), leaves)]


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 70])
def test_every_chunk_and_group_size_agrees_with_the_step(tokens, packed, decay):
    inputs, state = streams(tokens, decay), torch.randn(BATCH, HEADS, KEY, VALUE, dtype=torch.float64)
    segments = pattern(tokens) if packed else None
    if packed:  # NaN at pads moves neither value nor gradient
        inputs = [segments.hold(x, float("nan")) for x in inputs]
    want = everything(recurrent, inputs, state, segments)
    assert all(x.isfinite().all() for x in want)
    for chunk, group in [(1, 3), (4, 2), (16, 8), (64, 8), (tokens, 2)]:
        found = everything(delta_scan.chunked, inputs, state, segments, chunk=chunk, group=group)
        for got, right in zip(found, want, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-10)
    for got, right in zip(everything(delta_scan.parallel, inputs, state, segments), want, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-10)
    mixed = torch.einsum("bhij,bjhv->bihv", delta_scan.matrix(*inputs[:2], *inputs[3:], segments=segments),
                         inputs[2] if segments is None else segments.hold(inputs[2]))
    torch.testing.assert_close(mixed, recurrent(*inputs, state=0 * state, segments=segments).y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", [delta_scan.chunked, delta_scan.parallel])
def test_a_violent_neighbour_leaves_no_rounding_error(form):
    # values and log decays of the other segment a million times larger: in float32 nothing may move by one bit
    quiet = streams(90, True, torch.float32)
    loud = [x.clone() for x in quiet]
    ids = torch.ones(BATCH, 90, dtype=torch.int64)
    ids[:, 30:65], ids[:, 65:] = 2, 3
    segments = resolve(ids, Track.start(BATCH))[0]
    for i in (2, 4):
        loud[i][:, 30:65] *= 1e6
    state = torch.randn(BATCH, HEADS, KEY, VALUE)
    other = (ids == 2)[..., None]
    for got, want in zip(*(everything(form, x, state, segments) for x in (loud, quiet)), strict=True):
        if got.shape[1] == 90:
            got, want = (torch.where(other.reshape(*ids.shape, *(1,) * (x.ndim - 2)), 0.0, x) for x in (got, want))
        assert torch.equal(got, want)


def test_the_parallel_form_never_looks_ahead():
    inputs = streams(40, True)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, 25] = 0.5
    before, after = (delta_scan.parallel(*x).y[:, :25] for x in (inputs, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("form", [recurrent, delta_scan.chunked, delta_scan.parallel])
def test_orthonormal_keys_are_a_perfect_memory_that_overwrites(form):
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    values = torch.randn(9, 4, dtype=torch.float64)
    k = torch.cat([keys, keys[:1]])[None, :, None]  # the first key again, with another value
    state = form(k, k, values[None, :, None], torch.ones(1, 9, 1, dtype=torch.float64),
                 state=torch.zeros(1, 1, 8, 4, dtype=torch.float64)).state[0, 0]
    torch.testing.assert_close(keys @ state, torch.cat([values[8:], values[1:8]]), rtol=0, atol=1e-10)


def test_ten_thousand_transitions_never_expand():
    # no writes, from the identity: what is left is the product of the transitions, in two independent ways
    tokens, size = 10_000, 8
    k = F.normalize(torch.randn(1, tokens, 1, size, dtype=torch.float64), dim=-1)
    beta = 2 * torch.rand(1, tokens, 1, dtype=torch.float64)
    beta[:, ::2] = 2.0  # reflections keep the length exactly, so that the product does not vanish
    beta[:, 1::2] *= 1e-3
    eye = torch.eye(size, dtype=torch.float64)
    _, state, _ = delta_scan.chunked(k, k, torch.zeros_like(k), beta, state=eye[None, None])
    product = eye
    for key, b in zip(k[0, :, 0], beta[0, :, 0], strict=True):
        product = product - b * torch.outer(key, key @ product)
    torch.testing.assert_close(state[0, 0], product, rtol=0, atol=1e-10)
    assert 1e-3 < torch.linalg.matrix_norm(state[0, 0], 2) <= 1 + 1e-9


def several(tokens: int, steps: int, decay: bool) -> list[Tensor]:
    """Streams of `steps` steps a token; in the first head beta is 2 (reflections), in the second below 1."""
    q, k, v, beta, *log_a = streams(tokens * steps, decay)
    beta = torch.stack([torch.full_like(beta[..., 0], 2.0), beta[..., 1] / 2, beta[..., 2]], -1)
    return [q[:, :tokens], *(x.unflatten(1, (tokens, steps)) for x in (k, v, beta)), *(x[:, :tokens] for x in log_a)]


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tokens", "steps"), [(1, 2), (17, 1), (23, 3), (40, 4)])
def test_several_steps_a_token_agree_with_the_step(tokens, steps, packed, decay):
    inputs, state = several(tokens, steps, decay), torch.randn(BATCH, HEADS, KEY, VALUE, dtype=torch.float64)
    segments = pattern(tokens) if packed else None
    if packed:
        inputs = [segments.hold(x, float("nan")) for x in inputs]
    want = everything(recurrent, inputs, state, segments)
    assert all(x.isfinite().all() for x in want)
    for form in (delta_scan.parallel, *(partial(delta_scan.chunked, chunk=chunk) for chunk in (1, 5, 16, 64))):
        for got, right in zip(everything(form, inputs, state, segments), want, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-10)
    weights = delta_scan.matrix(*inputs[:2], *inputs[3:], segments=segments)
    values = (inputs[2] if segments is None else segments.hold(inputs[2])).flatten(1, 2)
    torch.testing.assert_close(torch.einsum("bhij,bjhv->bihv", weights, values),
                               recurrent(*inputs, state=0 * state, segments=segments).y, rtol=0, atol=1e-10)


def test_several_steps_a_token_are_one_decay_and_a_product_of_transitions():
    # the last step is the leftmost factor ([deltaproduct] Method 2), written out with matrices
    tokens, steps = 7, 3
    q, k, v, beta, log_a = several(tokens, steps, True)
    eye, state, want = torch.eye(KEY, dtype=torch.float64), torch.zeros(KEY, VALUE, dtype=torch.float64), []
    for t in range(tokens):
        move, write = log_a[0, t, 2].exp() * eye, torch.zeros_like(state)
        for j in range(steps):
            key, value, b = k[0, t, j, 2], v[0, t, j, 2], beta[0, t, j, 2]
            factor = eye - b * torch.outer(key, key)
            move, write = factor @ move, factor @ write + b * torch.outer(key, value)
        state = move @ state + write
        want.append(state.T @ q[0, t, 2])
    for form in (partial(recurrent, state=torch.zeros(BATCH, HEADS, KEY, VALUE, dtype=torch.float64)), delta_scan.chunked,
                 delta_scan.parallel):
        torch.testing.assert_close(form(q, k, v, beta, log_a).y[0, :, 2], torch.stack(want), rtol=0, atol=1e-12)


def test_the_knockout_only_adds():
    # the same layer without the erasure: a key written twice returns the sum of its values
    k = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    v, beta = torch.tensor([[[[2.0]], [[3.0]]]]), torch.ones(1, 2, 1)
    start = torch.zeros(1, 1, 2, 1)
    for erase, want in ((True, 3.0), (False, 5.0)):
        forms = DeltaNet(heads=1, erase=erase).forms
        for form in (forms[name] for name in runnable(forms, "cpu")):
            assert form(k, k, v, beta, state=start).y[0, 1, 0, 0] == want


def test_sum_normalised_keys_must_not_be_negative():
    with pytest.raises(ValueError, match="activation='elu'"):
        DeltaNet(heads=2, key_norm="sum")


def test_steps_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="steps=0"):
        DeltaProduct(heads=2, steps=0)
    with pytest.raises(ValueError, match="DeltaNet has erase=False"):
        DeltaProduct(heads=2, erase=False)


@pytest.mark.peer
def test_kernel_and_layer_agree_with_transformers():
    peer = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers import Qwen3NextConfig

    q, k, v, beta, log_a = streams(70, True, torch.float32)
    o, state = peer.torch_recurrent_gated_delta_rule(q, k, v, log_a, beta, output_final_state=True)
    y, new, _ = delta_scan.chunked(q * KEY**-0.5, k, v, beta, log_a)
    torch.testing.assert_close(y, o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new, state, rtol=1e-5, atol=1e-5)

    heads, size, dim = 2, 16, 32
    config = Qwen3NextConfig(hidden_size=dim, linear_num_value_heads=heads, linear_num_key_heads=heads, num_hidden_layers=4,
                             linear_key_head_dim=size, linear_value_head_dim=size, linear_conv_kernel_dim=4, rms_norm_eps=1e-5)
    theirs, ours = peer.Qwen3NextGatedDeltaNet(config, 0), GatedDeltaNet(heads=heads).build(BuildContext(dim=dim))
    rows = theirs.in_proj_qkvz.weight.unflatten(0, (heads, 4, size)).transpose(0, 1).flatten(1, 2)
    weights = {"qkv.weight": rows[:3].flatten(0, 1), "g_proj.weight": rows[3], "conv.weight": theirs.conv1d.weight[:, 0],
               "b_proj.weight": theirs.in_proj_ba.weight[0::2], "a_proj.weight": theirs.in_proj_ba.weight[1::2],
               "A_log": theirs.A_log, "dt_bias": theirs.dt_bias, "o_norm.weight": theirs.norm.weight,
               "o_proj.weight": theirs.out_proj.weight}
    ours.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    x = torch.randn(2, 70, dim)
    torch.testing.assert_close(ours(x, info=Info()).y, theirs(x), rtol=1e-4, atol=1e-5)

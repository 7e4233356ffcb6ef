"""Softmax attention on a CUDA device: values, gradients, log-sum-exps against float64. `pytest -m gpu`; skipped elsewhere."""

import pytest
import torch

from seqloom.core import Track
from seqloom.core.segments import resolve
from seqloom.kernels import softmax
from seqloom.kernels.merge import merge
from seqloom.kernels.softmax import Pattern
from seqloom.parts.positions import alibi_slopes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]

PATTERNS = {
    "causal": Pattern(),
    "dense": Pattern(order="dense"),
    "window": Pattern(window=50),
    "prefix": Pattern(prefix=30),
    "slopes": Pattern(slopes=alibi_slopes(4)),
}
TOKENS = 300


def segments():
    """Short and long segments, pads inside, at the left and at the right; boundaries at and beside the edge of a block."""
    ids = torch.tensor([[1] * 3 + [2] * 125 + [0] * 4 + [2] * 60 + [3] * 108, [0] * 40 + [1] * 88 + [2] + [3] * 129 + [0] * 42])
    return resolve(ids.cuda(), Track.start(2, "cuda"))[0]


def streams(dtype, stored=TOKENS):
    torch.manual_seed(0)
    sizes = (TOKENS, 4), (stored, 2), (stored, 2)
    return [torch.randn(2, tokens, heads, 64, device="cuda").to(dtype) for tokens, heads in sizes]


def plain(q, k, v, *, pattern, segments=None):
    """Attention as one writes it in 16 bits: products of 16 bits, the softmax in float32, its weights rounded."""
    q, k, v, queries, keys = softmax._placed(q, k, v, segments, None, None, None)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    score = (torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5).float()
    bias, keep = pattern.bias(queries, keys, torch.float32), pattern.sees(queries, keys)[:, None]
    weight = torch.where(keep, score if bias is None else score + bias, -1e4).softmax(-1)
    weight = torch.where(keep.any(-1, keepdim=True), weight, 0.0).to(v.dtype)
    return softmax.Partial(torch.einsum("bhts,bshv->bthv", weight, v), None)


def results(form, given, *, lse, **how):
    """y, log-sum-exp, and the gradients of a fixed sum of y (and of lse)."""
    given = [x.detach().clone().requires_grad_() for x in given]
    poison = torch.full((2**24,), float("nan"), device="cuda")
    del poison  # the allocator hands these pages to whoever asks next
    y, found = form(*given, **how)
    draw = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(shape, device="cuda", generator=draw) for shape in (y.shape, y.shape[:3])]
    loss = (y * weights[0]).sum()
    if lse:
        loss = loss + torch.where(found == -torch.inf, 0.0, found * weights[1]).sum()
    return [y.detach(), *torch.autograd.grad(loss, given)], found


@pytest.mark.parametrize("where", ["whole", "segments", "cached"])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("form", ["fused", "flex"])
def test_a_form_errs_at_most_twice_as_much_as_plain_pytorch_in_bfloat16(form, name, where):
    given = streams(torch.bfloat16, TOKENS + 90 if where == "cached" else TOKENS)
    how = dict(pattern=PATTERNS[name])
    if where == "segments":
        how["segments"] = segments()
        given = [how["segments"].hold(x, torch.nan) for x in given]  # what pads hold moves nothing
    rms = lambda x, y: float((x.double() - y).square().mean().sqrt() / y.square().mean().sqrt())  # noqa: E731
    allowed, _ = results(plain, given, lse=False, **how)
    for lse in (False, True)[: 1 + (form == "flex")]:
        want, exact = results(softmax.matrix, [x.double() for x in given], lse=lse, **how)
        got, found = results(softmax.FORMS[form], given, lse=lse, **how)
        for g, p, w in zip(got, allowed, want, strict=True):
            assert rms(g, w) < (0.02 if lse else 2 * rms(p, w))
        if found is not None:
            assert ((found == -torch.inf) == (exact == -torch.inf)).all()
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


def test_parts_merge_to_the_whole():
    q, k, v = streams(torch.bfloat16)
    whole = softmax.matrix(*(x.double() for x in (q, k, v)), pattern=Pattern(order="dense"))
    cuts = (0, 40), (40, 200), (200, TOKENS)
    parts = [softmax.flex(q, k[:, a:b], v[:, a:b], pattern=Pattern(order="dense")) for a, b in cuts]
    torch.testing.assert_close(merge(parts).y.double(), whole.y, rtol=0, atol=0.02)
    torch.testing.assert_close(merge(parts).lse.double(), whole.lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["fused", "flex"])
def test_memory_is_linear_in_tokens(form):
    """Twice the tokens in a row take at most 2.3 times the memory, forward and backward, segments included."""
    peaks = []
    for tokens in (8192, 16384):
        given = [torch.randn(1, tokens, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        ids = torch.arange(tokens, device="cuda")[None] // 3000 + 1
        run = lambda: softmax.FORMS[form](*given, pattern=Pattern(), segments=resolve(ids, Track.start(1, "cuda"))[0]).y  # noqa: B023, E731
        torch.autograd.grad(run().sum(), given)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(run().sum(), given)
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert peaks[1] < 2.3 * peaks[0]


def test_new_segments_of_a_length_compile_nothing():
    softmax.flex(*streams(torch.bfloat16), pattern=Pattern(), segments=segments())
    with torch._dynamo.config.patch(error_on_recompile=True):
        ids = torch.randint(1, 3, (2, TOKENS), device="cuda").cummax(1).values
        softmax.flex(*streams(torch.bfloat16), pattern=Pattern(window=9), segments=resolve(ids, Track.start(2, "cuda"))[0])

"""Softmax attention beyond the laws: the pattern against plain loops, merging, regrouping, the band, caches, peers."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from seqloom.core import BuildContext, Info, Segments, Track
from seqloom.core.forms import runnable
from seqloom.core.segments import resolve
from seqloom.core.state import leaves
from seqloom.kernels import cuda_attention, softmax
from seqloom.kernels.merge import Partial, merge
from seqloom.kernels.rows import pack, regroup
from seqloom.kernels.softmax import Coords, Pattern, line
from seqloom.mixers.softmax import SoftmaxAttention
from seqloom.parts.positions import LinearScaling, Llama3Scaling, Rope, YarnScaling, alibi_slopes, rotate, rotate_qkv

PATTERNS = {
    "causal": Pattern(),
    "dense": Pattern(order="dense"),
    "window": Pattern(window=5),
    "wide window": Pattern(window=100),
    "both sides": Pattern(order="dense", window=4),
    "prefix": Pattern(prefix=3),
    "slopes": Pattern(slopes=alibi_slopes(4)),
    "slopes in a window": Pattern(window=6, slopes=alibi_slopes(4)),
}
FORMS = {name: softmax.FORMS[name] for name in runnable(softmax.FORMS, "cpu")}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def qkv(tokens, stored=None, batch=2):
    stored = stored or tokens
    return draw(batch, tokens, 4, 6), draw(batch, stored, 2, 6, seed=1), draw(batch, stored, 2, 5, seed=2)


def packed(tokens):
    """Two rows of ids: short segments with pads inside; one long segment after pads on the left."""
    first = [1] * 3 + [0] * 2 + [2] + [3] * 9 + [0] + [3] * 4 + [1] * tokens
    second = [0] * 4 + [7] * (tokens - 7) + [8] * 3
    ids = torch.tensor([first[:tokens], second[:tokens]])
    return resolve(ids, Track.start(2))[0], ids


def loops(q, k, v, pattern, ids):
    """softmax(QK'/sqrt(d) + bias) V by loops, from the words of `Pattern`, over real tokens of the same segment."""
    q, k, v = (x.numpy() for x in (q, k, v))
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        segments, current, last = [], None, 0
        for t, name in enumerate(ids[b].tolist()):
            if name and name != last:
                current = []
                segments.append(current)
                last = name
            if name:
                current.append(t)
        for tokens in segments:
            for i, t in enumerate(tokens):
                scores, values = [], []
                for j, s in enumerate(tokens):
                    if pattern.order == "causal" and j > i and j >= pattern.prefix:
                        continue
                    if pattern.window is not None and abs(i - j) >= pattern.window:
                        continue
                    bias = -pattern.slopes[h] * abs(i - j) if pattern.slopes else 0.0
                    scores.append(q[b, t, h] @ k[b, s, h // 2] / math.sqrt(q.shape[-1]) + bias)
                    values.append(v[b, s, h // 2])
                weight = np.exp(np.array(scores) - max(scores))
                y[b, t, h] = weight @ np.array(values) / weight.sum()
    return torch.from_numpy(y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_is_what_its_words_say(name, form):
    segments, ids = packed(24)
    q, k, v = qkv(24)
    got = FORMS[form](q, k, v, pattern=PATTERNS[name], segments=segments).y
    torch.testing.assert_close(got, loops(q, k, v, PATTERNS[name], ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("past", [0, 37, 150])
@pytest.mark.parametrize("name", PATTERNS)
def test_forms_agree_over_many_blocks(name, past):
    """200 tokens after `past` cached keys: bands, key blocks and their edges; outputs, lse and gradients, lse's included."""
    pattern, tokens = PATTERNS[name], 200
    segments, _ = packed(tokens)
    q, k, v = qkv(tokens, tokens + past)
    own = softmax.packed(segments)
    offset = torch.where(own.run == 0, past, 0)
    before = line(past, q.device).expand(2)._replace(real=torch.arange(past).expand(2, -1) > 2)
    keys = softmax.cat(before, own._replace(position=own.position + offset))
    placed = dict(queries=keys.slice(past, past + tokens), keys=keys) if past else {}
    seen = {}
    for form, function in FORMS.items():
        streams = [x.clone().requires_grad_() for x in (q, k, v)]
        y, lse = function(*streams, pattern=pattern, segments=segments, **placed)
        loss = (y * draw(*y.shape, seed=5)).sum()
        seen[form] = [y, *torch.autograd.grad(loss, streams, retain_graph=lse is not None)]
        if lse is not None:
            loss = torch.where(lse == -torch.inf, 0.0, lse * draw(*lse.shape, seed=6)).sum() + loss
            seen[form + " lse"] = [lse, *torch.autograd.grad(loss, streams)]
    for form, definition in (("chunked", "matrix"), ("chunked lse", "matrix lse"), ("fused", "matrix")):
        for got, want in zip(seen[form], seen[definition], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_merge_of_parts_is_the_whole_in_any_order():
    q, k, v = (x.requires_grad_() for x in qkv(9, 30))
    whole = softmax.matrix(q, k, v, pattern=Pattern(order="dense"))
    nothing = Coords(*line(4, q.device)[:2], real=torch.zeros(1, 4, dtype=torch.bool))
    parts = [softmax.chunked(q, k[:, a:b], v[:, a:b], pattern=Pattern(order="dense")) for a, b in ((0, 7), (7, 8), (8, 30))]
    parts.append(softmax.chunked(q, k[:, :4], v[:, :4], pattern=Pattern(order="dense"), keys=nothing))
    for order in ((0, 1, 2, 3), (3, 2, 0, 1)):
        left = merge([merge([parts[i] for i in order[:2]]), *(parts[i] for i in order[2:])])
        torch.testing.assert_close(left.y, whole.y, rtol=0, atol=1e-12)
        torch.testing.assert_close(left.lse, whole.lse, rtol=0, atol=1e-12)
    weight = draw(*whole.y.shape), draw(*whole.lse.shape)
    loss = lambda part: (part.y * weight[0]).sum() + (part.lse * weight[1]).sum()  # noqa: E731
    for got, want in zip(torch.autograd.grad(loss(left), [q, k, v]), torch.autograd.grad(loss(whole), [q, k, v]), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="log-sum-exp of every part"):
        merge([whole, Partial(whole.y)])


@pytest.mark.parametrize("form", FORMS)
def test_no_visible_key_gives_zero_and_finite_gradients(form):
    q, k, v = (x.requires_grad_() for x in qkv(3, 8))
    keys = line(8, q.device).expand(2)._replace(real=torch.tensor([[True] * 8, [False] * 8]))
    y, lse = FORMS[form](q, k, v, pattern=Pattern(order="dense"), keys=keys)
    assert not y[1].any() and y[0].all()
    assert lse is None or (lse[1] == -torch.inf).all()
    gradients = torch.autograd.grad(merge([Partial(y, lse)]).y.sum() if lse is not None else y.sum(), [q, k, v])
    assert all(g.isfinite().all() and not g[1].any() for g in gradients)


def test_multiplicities_count_a_key_several_times():
    q, k, v = qkv(4, 5)
    times = torch.tensor([1, 3, 1, 2, 1])
    repeated = softmax.matrix(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), pattern=Pattern(order="dense"))
    for form in FORMS.values():
        got = form(q, k, v, pattern=Pattern(order="dense"), keys=line(5, q.device)._replace(counts=times[None]))
        torch.testing.assert_close(got.y, repeated.y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_stay_finite(form):
    q, k, v = (x.float() for x in qkv(40))
    y = FORMS[form](q * 1e2, k * 1e2, v, pattern=Pattern()).y
    torch.testing.assert_close(y.double(), softmax.matrix(q.double() * 1e2, k.double() * 1e2, v.double(), pattern=Pattern()).y,
                               rtol=0, atol=1e-3)


# Rows --------------------------------------------------------------------------------------------------------------

def test_regroup_gives_every_segment_its_row():
    segments, ids = packed(60)
    rows = regroup(segments)
    x = torch.where(ids[..., None] == 0, torch.nan, draw(2, 60, 3)).requires_grad_()
    parts = rows.split(x)
    assert sum(bucket.token.shape[0] for bucket in rows.buckets) == 6
    for bucket, part in zip(rows.buckets, parts, strict=True):
        assert bucket.real.any(0).all(), "a bucket is no longer than its longest row"
        assert (bucket.real.sum(1) * 2 > bucket.real.shape[1]).all(), "a row is at least half full"
        assert not part[~bucket.real].any()
        for row, token, real, b, run in zip(part, bucket.token, bucket.real, bucket.row, bucket.run, strict=True):
            mine = segments.real[b] & (segments.run[b] == run)
            torch.testing.assert_close(row[real], x[b][mine], rtol=0, atol=0)
            assert (token[real] == b * 60 + mine.nonzero()[:, 0]).all()
    back = rows.join([part * 2 + 1 for part in parts])
    torch.testing.assert_close(back, torch.where(ids[..., None] == 0, 0.0, x * 2 + 1), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(back.sum(), x)
    torch.testing.assert_close(gradient, torch.where(ids[..., None] == 0, 0.0, 2.0).expand_as(x).double(), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda x: rows.join(rows.split(x)), draw(2, 60, 1).requires_grad_())


def test_regroup_of_whole_and_of_empty_rows():
    whole = Segments(torch.ones(3, 5, dtype=torch.bool), torch.tensor([[0] * 5, [1] * 5, [0] * 5]))
    x = draw(3, 5, 2)
    assert regroup(whole).split(x)[0] is x
    none = Segments(torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.int64))
    assert regroup(none).buckets == ()
    for form in FORMS.values():
        assert not form(*qkv(5), pattern=Pattern(), segments=none).y.any()


# What runs on CUDA, as far as a CPU shows it ------------------------------------------------------------------------------

def after(past, tokens):
    """Coordinates of `tokens` in segments after `past` cached keys, the first three of which are gone."""
    own = softmax.packed(packed(tokens)[0])
    if not past:
        return own, own
    own = own._replace(position=own.position + torch.where(own.run == 0, past, 0))
    before = line(past, torch.device("cpu")).expand(2)._replace(real=torch.arange(past).expand(2, -1) > 2)
    keys = softmax.cat(before, own)
    return keys.slice(past, past + tokens), keys


@pytest.mark.parametrize(("tokens", "past"), [(24, 0), (24, 150), (300, 0), (300, 37)])
@pytest.mark.parametrize("name", PATTERNS)
def test_an_interval_of_keys_is_what_a_query_sees(name, tokens, past):
    pattern = PATTERNS[name]
    plain = line(tokens, torch.device("cpu"), past), line(tokens + past, torch.device("cpu"))
    shuffle = torch.randperm(tokens + past, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    own, stored = after(past, tokens)
    for queries, keys in ((own, stored), (own, stored.take(shuffle)), plain):
        first, last, rank = pattern.interval(queries, keys)
        seen = (first[:, :, None] <= rank[:, None]) & (rank[:, None] <= last[:, :, None])
        assert (seen == pattern.sees(queries, keys)).all() and first.dtype == last.dtype == rank.dtype == torch.int32


@pytest.mark.parametrize(("tokens", "past"), [(24, 0), (300, 0), (300, 150)])
@pytest.mark.parametrize("pattern", [*PATTERNS.values(), Pattern(window=200), Pattern(order="dense", window=200)], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_blocks_are_those_with_visible_pairs(pattern, whole, tokens, past):
    stored, place = tokens + past, torch.device("cpu")
    queries, keys = (line(tokens, place, past), line(stored, place)) if whole else after(past, tokens)
    shape = cuda_attention.filled(tokens, stored)
    mask = cuda_attention.blocks(*pattern.interval(queries, keys), *shape)
    sees = torch.nn.functional.pad(pattern.sees(queries, keys), (0, shape[1] - stored, 0, shape[0] - tokens))
    share = sees.unflatten(2, (-1, mask.BLOCK_SIZE[1])).unflatten(1, (-1, mask.BLOCK_SIZE[0])).double().mean((2, 4))

    def listed(count, index):
        chosen = torch.zeros_like(share, dtype=torch.bool)
        for b, i in itertools.product(*map(range, share.shape[:2])):
            chosen[b, i, index[b, 0, i, : count[b, 0, i]].long()] = True
        return chosen

    assert (listed(mask.full_kv_num_blocks, mask.full_kv_indices) == (share == 1)).all()
    assert (listed(mask.kv_num_blocks, mask.kv_indices) == ((share > 0) & (share < 1))).all()


def test_lengths_are_filled_up_to_few_sizes():
    sizes = [cuda_attention.bucket(n) for n in range(1, 40_000)]
    assert all(n <= size and size % 128 == 0 for n, size in enumerate(sizes, 1))
    assert all(size <= max(n + 127, 1.25 * n) for n, size in enumerate(sizes, 1)) and len(set(sizes)) < 32
    assert cuda_attention.filled(1000, 1000) == (1024, 1024) and cuda_attention.filled(1100, 1100) == (1280, 1280)
    assert cuda_attention.filled(100, 2100) == (128, 4096)
    for n in (128, 1024, 5 * 2**15, 7 * 2**18, 2**20):
        size, block = cuda_attention.bucket(n), cuda_attention.block_size(cuda_attention.bucket(n))
        assert size % block == 0 and size // block <= 1024 and block % 128 == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", PATTERNS)
def test_flex_is_the_definition(name):
    """Uncompiled, on the CPU, where it is not offered: what it is given, filled up and cut off. Heads of 6 and 5 numbers."""
    assert "flex" not in FORMS
    with torch.no_grad():
        for tokens, past, given in ((70, 0, False), (70, 0, True), (70, 80, False), (70, 80, True)):
            q, k, v = (x.float() for x in qkv(tokens, tokens + past))
            how = dict(zip(("queries", "keys"), after(past, tokens), strict=True)) if given and past else {}
            how |= dict(segments=packed(tokens)[0]) if given else {}
            got = softmax.flex(q, k, v, pattern=PATTERNS[name], **how)
            want = softmax.matrix(q.double(), k.double(), v.double(), pattern=PATTERNS[name], **how)
            torch.testing.assert_close(got.y.double(), want.y, rtol=0, atol=2e-6)
            torch.testing.assert_close(got.lse.double(), want.lse, rtol=0, atol=2e-6)
        q, k, v = (x.float() for x in qkv(4, 5))
        keys = line(5, q.device)._replace(counts=torch.tensor([[1, 3, 1, 2, 1]]))
        pattern = Pattern(order="dense", slopes=alibi_slopes(4))
        for got, want in zip(*(f(q, k, v, pattern=pattern, keys=keys) for f in (softmax.flex, softmax.matrix)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_compiles_once_for_the_lengths_of_a_size_and_all_patterns(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(cuda_attention, "_attend", cuda_attention._compiled.__wrapped__("a test"))
    with torch.no_grad():
        for tokens in (130, 200, 250):
            q, k, v = (x.float() for x in qkv(tokens))
            for name in ("causal", "dense", "window", "prefix"):
                how = dict(pattern=PATTERNS[name], segments=packed(tokens)[0])
                torch.testing.assert_close(softmax.flex(q, k, v, **how).y, softmax.matrix(q, k, v, **how).y, rtol=0, atol=2e-6)
    assert counter.frame_count == 1
    whole = torch.compile(lambda q, k, v: softmax.flex(q, k, v, **how).y, fullgraph=True)  # and within a user's graph
    with torch.no_grad():
        torch.testing.assert_close(whole(q, k, v), softmax.matrix(q, k, v, **how).y, rtol=0, atol=2e-6)


def test_every_kernel_has_a_limit_of_recompilations_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(cuda_attention, "_attend", lambda x, by: x * by)
    with torch._dynamo.config.patch(recompile_limit=2):
        for by in range(4):
            assert cuda_attention._compiled.__wrapped__(by)(torch.ones(2), by).tolist() == [by, by]
        with pytest.raises(Exception, match=r"fullgraph|recompile"):
            for by in range(4):
                torch.compile(cuda_attention._attend, fullgraph=True, dynamic=False)(torch.ones(2), by)


@pytest.mark.parametrize("ids", [None, 1])
@pytest.mark.parametrize("settings", [{}, dict(window=16), dict(position="alibi"), dict(prefix=5)], ids=str)
def test_a_layer_is_one_graph(settings, ids):
    mixer, x = layer(**settings), draw(2, 200, 16)
    info = Info(segments=None if ids is None else packed(200)[1])
    torch._dynamo.reset()
    got = torch.compile(mixer, backend="eager", fullgraph=True)(x, info=info).y
    torch.testing.assert_close(got, mixer(x, info=info).y, rtol=0, atol=1e-12)


def varlen_in_words(q, k, v, q_starts, k_starts, most_q, most_k, window, scale):
    """What torch.nn.attention.varlen computes, row by row."""
    y, ends = [], [x.tolist() for x in (q_starts, k_starts)]
    assert most_q == max(b - a for a, b in itertools.pairwise(ends[0])) and q_starts.dtype == torch.int32
    assert most_k == max(b - a for a, b in itertools.pairwise(ends[1])) and ends[0][-1] == q.shape[0]
    for (a, b), (c, d) in zip(*map(itertools.pairwise, ends), strict=True):
        ahead = torch.arange(d - c)[None] - torch.arange(b - a)[:, None] - (d - c - b + a)
        hidden = (ahead > window[1] if window[1] >= 0 else False) | torch.tensor(window[0] >= 0) & (-ahead > window[0])
        key, value = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        score = torch.einsum("thk,shk->hts", q[a:b], key) * scale
        y.append(torch.einsum("hts,shv->thv", score.masked_fill(hidden, -torch.inf).softmax(-1), value))
    return torch.cat(y)


@pytest.mark.parametrize("name", ["causal", "dense", "window", "wide window", "both sides"])
def test_rows_of_any_length_are_the_segments(name, monkeypatch):
    monkeypatch.setattr(cuda_attention, "varlen", varlen_in_words)
    pattern, real = PATTERNS[name], torch.ones(2, 60, dtype=torch.bool)
    for segments in (packed(60)[0], Segments(real, torch.tensor([[0] * 60, [1] * 60])), Segments(~real, torch.zeros(2, 60)),
                     Segments(real, torch.tensor([[0] * 20 + [1] * 40, [1] * 7 + [2] * 53]))):
        q, k, v = (segments.hold(x, torch.nan).requires_grad_() for x in qkv(60))
        seen = [softmax._by_length(q, k, v, pattern, segments, None),
                softmax.matrix(q, k, v, pattern=pattern, segments=segments).y]
        for y in list(seen):
            seen += torch.autograd.grad((y * draw(*y.shape, seed=3)).sum(), (q, k, v)) if y.any() else []
        for got, want in zip(*(seen[:1] + seen[2:5], seen[1:2] + seen[5:]), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    for stored in (60, 83):  # whole rows, the queries last
        q, k, v = qkv(60, stored)
        got, want = softmax._by_length(q, k, v, pattern, None, None), softmax.matrix(q, k, v, pattern=pattern).y
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_pack_counts_from_segments():
    segments, ids = packed(60)
    rows = pack(segments)
    lengths = sorted(itertools.chain(*(bucket.real.sum(1).tolist() for bucket in regroup(segments).buckets)))
    assert sorted(torch.diff(rows.starts).tolist()) == lengths and rows.longest == lengths[-1]
    x = torch.where(ids[..., None] == 0, torch.nan, draw(2, 60, 3)).requires_grad_()
    torch.testing.assert_close(rows.join(rows.split(x)), torch.where(ids[..., None] == 0, 0.0, x), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(rows.split(x).sum(), x)
    torch.testing.assert_close(gradient, torch.where(ids[..., None] == 0, 0.0, 1.0).expand_as(x).double(), rtol=0, atol=0)


def test_one_query_of_grouped_heads():
    q, k, v = qkv(1, 9)
    keep, bias = torch.rand(2, 1, 1, 9) > 0.3, torch.randn(1, 4, 1, 9).double()
    keep[..., 0] = True
    for mask in (None, keep, torch.where(keep, bias, -torch.inf)):
        got, want = (f(q, k, v, 0.7, mask) for f in (softmax._one_query, softmax._sdpa))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


class OnCuda:
    """Streams on a CUDA device, as far as the choice of a form looks at them."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, tokens, heads=16, dim=128, dtype=torch.bfloat16):
        self.shape, self.dtype = (2, tokens, heads, dim), dtype


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(cuda_attention, "VARLEN", True)
    monkeypatch.setattr(cuda_attention, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.parametrize(("first", "how"), [
    ("fused", dict(pattern="causal")),                                        # scaled_dot_product_attention
    ("fused", dict(pattern="dense", stored=4000)),
    ("fused", dict(pattern="causal", stored=4000)),                           # rows of any length
    ("fused", dict(pattern="causal", segments=True)),
    ("fused", dict(pattern="both sides", segments=True)),
    ("fused", dict(pattern="window")),
    ("fused", dict(pattern="slopes", tokens=1, stored=4000, keys=True)),      # one row of a mask
    ("flex", dict(pattern="prefix")),
    ("flex", dict(pattern="slopes")),
    ("flex", dict(pattern="slopes in a window", segments=True)),
    ("flex", dict(pattern="causal", stored=4000, keys=True, segments=True)),
    ("flex", dict(pattern="causal", segments=True, dim=512)),                 # flash attention takes heads up to 256
    ("flex", dict(pattern="causal", lse=True)),
    ("flex", dict(pattern="causal", tokens=1, lse=True)),
    ("chunked", dict(pattern="prefix", dtype=torch.float32)),
    ("chunked", dict(pattern="dense", segments=True, dtype=torch.float32)),
    ("fused", dict(pattern="causal", segments=True, dtype=torch.float32)),    # causal rows, no mask
    ("fused", dict(pattern="window", segments=True, dtype=torch.float32)),    # a band
    ("fused", dict(pattern="prefix", dtype=torch.float64)),
    ("fused", dict(pattern="causal", tokens=5, stored=4000, keys=True, grad=False)),  # a small mask, and no gradient
    ("flex", dict(pattern="causal", tokens=5, stored=4000, keys=True)),
    ("flex", dict(pattern="slopes", tokens=50, segments=True, grad=False)),
    ("flex", dict(pattern="causal", segments=True, captured=True)),           # nothing may be read from the device
    ("flex", dict(pattern="causal", segments=True, compiled=True)),
    ("fused", dict(pattern="causal", compiled=True)),
    ("fused", dict(pattern="window", compiled=True)),
], ids=str)
def test_which_form_a_call_takes_on_cuda(first, how, hopper, monkeypatch):
    how = dict(dict(tokens=2000, dtype=torch.bfloat16, dim=128, segments=False, keys=False, grad=True, compiled=False,
                    captured=False), **how)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: how["compiled"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: how["captured"])
    q, k = (OnCuda(n, dim=how["dim"], dtype=how["dtype"]) for n in (how["tokens"], how.get("stored", how["tokens"])))
    call = dict(pattern=PATTERNS[how["pattern"]], lse=how.get("lse", False), scale=None,
                segments="given" if how["segments"] else None, keys="given" if how["keys"] else None)
    with torch.set_grad_enabled(how["grad"]):
        found = softmax.preference(q, k, k, **call)
    able = [name for name in found if name != "flex" or how["dtype"] in softmax.HALF]  # what core.forms makes of it
    assert able[0] == first
    assert softmax.flex.chosen_for == softmax.HALF and "fused" not in (found if how.get("lse") else ())


def test_which_form_a_call_takes_on_the_cpu():
    pick = lambda tokens, name, **more: softmax.preference(  # noqa: E731
        *(torch.empty(1, tokens, 2, 4) for _ in range(3)), pattern=PATTERNS[name], **more)[0]
    assert [pick(n, name) for n in (1023, 1024) for name in ("causal", "slopes", "slopes in a window")] == \
        ["fused", "fused", "fused", "fused", "chunked", "fused"]
    assert pick(8, "causal", lse=True) == "chunked"


def test_cudnn_plans_few_shapes_and_those_that_come_often(monkeypatch):
    monkeypatch.setattr(cuda_attention, "_plans", set())
    monkeypatch.setattr(cuda_attention, "_calls", type(cuda_attention._calls)())
    assert all(cuda_attention._worth_a_plan(n) for n in range(cuda_attention.PLANS) for _ in range(2))
    asked = [cuda_attention._worth_a_plan("prompt") for _ in range(cuda_attention.PLAN_AFTER + 2)]
    assert asked == [False] * cuda_attention.PLAN_AFTER + [True] * 2
    assert not any(cuda_attention._worth_a_plan(("once", n)) for n in range(10_000)) and len(cuda_attention._calls) <= 4097


def test_cudnn_is_left_out_where_it_is_slow_or_wrong(hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda_attention, "_worth_a_plan", lambda shape: True)
    on = lambda heads, tokens, dim, groups=None: cuda_attention.planned(  # noqa: E731
        torch.empty(1, heads, tokens, dim), *(torch.empty(1, groups or heads, tokens, dim) for _ in range(2)))
    assert on(4, 2048, 128) and on(4, 2048, 64, 1)
    assert not on(4, 64, 128) and not on(4, 2048, 256) and not on(4, 2048, 100)
    monkeypatch.setattr(cuda_attention, "capability", lambda device: (10, 0))
    assert on(4, 2048, 128) and not on(4, 2048, 64, 1)
    monkeypatch.setattr(cuda_attention, "capability", lambda device: (8, 0))
    assert not on(4, 2048, 128)


# Positions -----------------------------------------------------------------------------------------------------------

def test_rotation_depends_on_distance_alone():
    rope, x = Rope(8, fraction=0.75), draw(1, 1, 1, 8).expand(1, 40, 1, 8)
    cos, sin = rope.angles(torch.arange(40), x.dtype)
    turned = rotate(x, cos, sin)[0, :, 0]
    scores = turned @ turned.T
    for distance in (1, 7, 20):
        assert torch.diagonal(scores, distance).std() < 1e-12
    torch.testing.assert_close(turned[:, 6:], x[0, :, 0, 6:])
    streams = draw(2, 40, 5, 8).requires_grad_()
    parts = rotate_qkv(streams, cos, sin, 3, 1)
    plain = (rotate(streams[:, :, :3], cos, sin), rotate(streams[:, :, 3:4], cos, sin), streams[:, :, 4:])
    weights = [draw(*part.shape, seed=3) for part in parts]
    grad = lambda parts: torch.autograd.grad(sum((p * w).sum() for p, w in zip(parts, weights, strict=True)), streams)[0]  # noqa: E731
    for got, want in zip((*parts, grad(parts)), (*plain, grad(plain)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.peer
@pytest.mark.parametrize(("theirs", "ours"), [
    (dict(rope_type="linear", factor=4.0), LinearScaling(factor=4.0)),
    (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024),
     Llama3Scaling(original_length=1024)),
    (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048), YarnScaling(factor=4.0, original_length=2048)),
    (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048, truncate=False, beta_fast=16.0),
     YarnScaling(factor=4.0, original_length=2048, fast=16.0, whole_channels=False)),
], ids=lambda value: value.get("rope_type") if isinstance(value, dict) else "")
def test_scaled_frequencies_are_those_of_transformers(theirs, ours):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=dict(rope_theta=10000.0, **theirs))
    want, gain = utils.ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu")
    cos, sin = Rope(64, scaling=ours).angles(torch.tensor([1]), torch.float64)
    torch.testing.assert_close(torch.atan2(sin, cos)[0], want.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.hypot(sin, cos)[0], torch.full_like(want.double(), gain), rtol=1e-6, atol=0)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_layer_is_that_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[kind]
    more = dict(sliding_window=7) if kind == "mistral" else {}
    config = getattr(transformers, name + "Config")(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                                    vocab_size=8, num_hidden_layers=1, intermediate_size=8, **more)
    torch.manual_seed(0)
    model = getattr(transformers, name + "Model")(config).double().eval()
    theirs = model.layers[0].self_attn
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.5)
    spec = SoftmaxAttention(heads=4, kv_heads=2, head_dim=8, bias="qkv" if kind == "qwen2" else "none",
                            qk_norm="rms" if kind == "qwen3" else "none", window=more.get("sliding_window"))
    ours = spec.build(BuildContext(dim=32)).double()
    parts = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    ours.qkv.weight.data = torch.cat([part.weight.data for part in parts])
    if kind == "qwen2":
        ours.qkv.bias.data = torch.cat([part.bias.data for part in parts])
    if kind == "qwen3":
        ours.q_norm.weight.data, ours.k_norm.weight.data = theirs.q_norm.weight.data, theirs.k_norm.weight.data
    ours.out.weight.data = theirs.o_proj.weight.data
    x = draw(2, 19, 32)
    mask = torch.ones(19, 19, dtype=torch.bool).tril()
    mask = mask & ~mask.tril(-7) if kind == "mistral" else mask
    # angles as theirs are laid out, but in float64
    turn = torch.arange(19)[:, None].double() * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    angles = tuple(torch.cat([value, value], -1)[None] for value in (turn.cos(), turn.sin()))
    with torch.no_grad():
        want = theirs(x, position_embeddings=angles, attention_mask=torch.where(mask, 0.0, -torch.inf).double()[None, None])[0]
        # Qwen3's norm of queries and keys computes in float32
        torch.testing.assert_close(ours(x).y, want, rtol=0, atol=1e-6 if kind == "qwen3" else 1e-12)


# Caches --------------------------------------------------------------------------------------------------------------

def layer(**settings):
    torch.manual_seed(0)
    return SoftmaxAttention(heads=2, **settings).build(BuildContext(dim=16)).double()


@torch.no_grad()
def test_a_fixed_cache_says_when_it_is_full():
    mixer, x = layer(), draw(2, 6, 16)
    state = mixer(x, state=mixer.init_state(2, capacity=8)).state
    with pytest.raises(ValueError, match=r"needs 12 slots and the state has 8.*capacity=12"):
        mixer(x, state=state)
    with pytest.raises(ValueError, match="keeps its addresses"):
        mixer(x, state=mixer(x).state, donate=True)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 7])
def test_donated_writes_touch_their_slots_only(window):
    mixer = layer(window=window)
    state = mixer.init_state(2, capacity=10)
    ids = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # the first row is padded on the left: it has written 3
    state = mixer(draw(2, 5, 16), state=state, info=Info(segments=ids), donate=True).state
    kept = state.cells.keys.clone()
    address = [leaf.data_ptr() for leaf in leaves(state)]
    after = mixer(draw(2, 1, 16), state=state, donate=True).state
    assert [leaf.data_ptr() for leaf in leaves(after)] == address
    changed = (after.cells.keys != kept).any(-1).any(1)
    assert changed.nonzero().tolist() == [[0, 3], [1, 5]]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, dict(window=70), dict(window=9), dict(position="alibi")], ids=str)
def test_long_calls_through_every_cache(settings):
    """Bands, rings that wrap within one call, and rows that stand unevenly: pieces equal the whole."""
    mixer, x = layer(**settings), draw(2, 230, 16)
    ids = torch.tensor([[0] * 31 + [1] * 199, [1] * 90 + [2] * 60 + [0] * 10 + [2] * 70])
    whole = mixer(x, info=Info(segments=ids)).y
    for start in (None, mixer.init_state(2), mixer.init_state(2, capacity=230)):
        state, parts = start, []
        for a, b in itertools.pairwise((0, 5, 140, 141, 142, 230)):
            y, state, _ = mixer(x[:, a:b], state=state, info=Info(segments=ids[:, a:b]))
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_a_spec_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="nearest is 2"):
        SoftmaxAttention(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="prefix"):
        SoftmaxAttention(heads=4, prefix=2, window=8)
    with pytest.raises(ValueError, match="window of 0"):
        SoftmaxAttention(heads=4, window=0)
    with pytest.raises(ValueError, match="pairs"):
        layer(rope_fraction=0.1)

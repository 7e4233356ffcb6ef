"""Softmax attention beyond the laws: the pattern against plain loops, merging, regrouping, the band, caches, peers."""

import itertools
import math

import numpy as np
import pytest
import torch

from seqloom.core import BuildContext, Info, Segments, Track
from seqloom.core.segments import resolve
from seqloom.core.state import leaves
from seqloom.kernels import softmax
from seqloom.kernels.merge import Partial, merge
from seqloom.kernels.rows import regroup
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


@pytest.mark.parametrize("form", softmax.FORMS)
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_is_what_its_words_say(name, form):
    segments, ids = packed(24)
    q, k, v = qkv(24)
    got = softmax.FORMS[form](q, k, v, pattern=PATTERNS[name], segments=segments).y
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
    for form, function in softmax.FORMS.items():
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


@pytest.mark.parametrize("form", softmax.FORMS)
def test_no_visible_key_gives_zero_and_finite_gradients(form):
    q, k, v = (x.requires_grad_() for x in qkv(3, 8))
    keys = line(8, q.device).expand(2)._replace(real=torch.tensor([[True] * 8, [False] * 8]))
    y, lse = softmax.FORMS[form](q, k, v, pattern=Pattern(order="dense"), keys=keys)
    assert not y[1].any() and y[0].all()
    assert lse is None or (lse[1] == -torch.inf).all()
    gradients = torch.autograd.grad(merge([Partial(y, lse)]).y.sum() if lse is not None else y.sum(), [q, k, v])
    assert all(g.isfinite().all() and not g[1].any() for g in gradients)


def test_multiplicities_count_a_key_several_times():
    q, k, v = qkv(4, 5)
    times = torch.tensor([1, 3, 1, 2, 1])
    repeated = softmax.matrix(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), pattern=Pattern(order="dense"))
    for form in softmax.FORMS.values():
        got = form(q, k, v, pattern=Pattern(order="dense"), keys=line(5, q.device)._replace(counts=times[None]))
        torch.testing.assert_close(got.y, repeated.y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", softmax.FORMS)
def test_large_scores_stay_finite(form):
    q, k, v = (x.float() for x in qkv(40))
    y = softmax.FORMS[form](q * 1e2, k * 1e2, v, pattern=Pattern()).y
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
    for form in softmax.FORMS.values():
        assert not form(*qkv(5), pattern=Pattern(), segments=none).y.any()


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

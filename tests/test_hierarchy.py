"""Two rates: what the recipe's checks do not say, that is errors, packing, donated states, the table of kinds, whole models."""

import pytest
import torch

from seqloom.core import Info
from seqloom.core import state as st
from seqloom.data.series import Scale, displacements, increments, rotate, with_deltas
from seqloom.laws.exact.hierarchy import CHUNK, CHUNKS, _draw, _layer, small
from seqloom.mixers import S4D, SoftmaxAttention
from seqloom.models import KINDS, Block, Hierarchy, SequenceModel, Stack, from_dict, to_dict
from seqloom.models.heads import PooledHead, TokenHead
from seqloom.models.stems import SeriesStem
from seqloom.objectives.regression import drift, squared_error

EXACT = dict(rtol=0, atol=1e-10)
TOTAL = CHUNK * CHUNKS
POOLS = [("last", "chunk"), ("mean", "chunk"), ("all", "sequence")]


@pytest.mark.parametrize(("pool", "memory"), POOLS)
def test_packed_is_separate_and_a_cut_anywhere_does_not_matter(pool, memory):
    """Segments of 12, 3 and 20 samples in chunks of 5: two, none and four outputs, the last under the id of the first."""
    layer, x = _layer(small(pool=pool, memory=memory)), _draw(2, TOTAL, 12)
    ids = torch.tensor([[1] * 12 + [2] * 3 + [1] * 20] * 2)
    loud = x.clone()
    loud[:, 10:15] *= 1e6  # what is dropped, and the segment without an output
    with torch.no_grad():
        want = torch.cat([layer(x[:, :10]).y, layer(x[:, 15:]).y], 1)
        got, info = layer(loud, info=Info(segments=ids)).y, Info(segments=ids)
        assert layer.answered(TOTAL, info).sum(1).tolist() == [6, 6]
        torch.testing.assert_close(got[:, :6], want, **EXACT)
        assert (got[:, 6:] == 0).all()
        for cut in (1, 3, 10, 11, 12, 13, 15, 16, 22):
            state, parts = layer.init_state(2), []
            for a, b in ((0, cut), (cut, TOTAL)):
                here = Info(segments=ids[:, a:b])
                answered = layer.answered(b - a, here, state)
                y, state, _ = layer(x[:, a:b], state=state, info=here)
                parts.append(y[:, answered[0]])
            torch.testing.assert_close(torch.cat(parts, 1), want, **EXACT)


@pytest.mark.parametrize(("pool", "memory"), POOLS)
def test_rows_at_different_places_in_their_chunks(pool, memory):
    """Rows begin 0, 3 and 4 samples late; one is held for a while. Each gets its own answers, in its own slots."""
    layer, x, total = _layer(small(pool=pool, memory=memory)), _draw(3, 20, 12), 28
    ids = torch.zeros(3, total, dtype=torch.int64)
    ids[0, :20] = ids[1, 3:10] = ids[1, 12:25] = ids[2, 4:24] = 1
    late = torch.full((3, total, 12), torch.nan, dtype=torch.float64)
    late[ids != 0] = x.flatten(0, 1)
    with torch.no_grad():
        want, state, rows = layer(x).y, layer.init_state(3), [[], [], []]
        for start in range(0, total, 3):
            info = Info(segments=ids[:, start : start + 3])
            answered = layer.answered(info.segments.shape[1], info, state)
            y, state, _ = layer(late[:, start : start + 3], state=state, info=info)
            for row in range(3):
                rows[row].append(y[row, answered[row]])
    torch.testing.assert_close(torch.stack([torch.cat(row) for row in rows]), want, **EXACT)


def test_state_is_left_alone_unless_donated():
    layer, x = _layer(small(pool="mean")), _draw(2, TOTAL, 12)
    with torch.no_grad():
        state = layer(x[:, :10]).state
        kept = st.clone(state)
        want = layer(x[:, 10:17], state=state)
        for before, after in zip(st.leaves(kept), st.leaves(state), strict=True):
            assert torch.equal(before, after)
        held = layer.init_state(2, capacity=TOTAL)
        places = [leaf.data_ptr() for leaf in st.leaves(held)]
        for sample in x[:, :17].split(1, 1):
            held = layer(sample, state=held, donate=True).state
        assert places == [leaf.data_ptr() for leaf in st.leaves(held)]
        more = _draw(2, 8, 12, seed=3)
        torch.testing.assert_close(layer(more, state=held).y, layer(more, state=want.state).y, **EXACT)


def test_state_size_is_constant_where_the_mixers_is():
    layer = small().build()
    assert layer.state_bytes(512) == layer.state_bytes(8192) == st.count_bytes(layer.init_state(1))
    growing = Hierarchy(low=small().low, high=Stack(dim=16, blocks=(Block(mixer=SoftmaxAttention(heads=2)),)), chunk=CHUNK)
    assert growing.build().state_bytes(8192) > growing.build().state_bytes(512)


def test_bidirectional_inside_chunks_is_causal_between_them():
    low = Stack(dim=12, blocks=(Block(mixer=S4D(state=8, direction="bidirectional"), mlp=None),))
    layer = _layer(Hierarchy(low=low, high=small().high, chunk=CHUNK))
    assert layer.spec.causal and not layer.spec.streams
    x = _draw(2, TOTAL, 12)
    other = x.clone()
    other[:, 24] += _draw(2, 12, seed=1)
    with torch.no_grad():
        moved = (layer(x).y - layer(other).y).abs().amax((0, 2))
        assert layer(x).state is None
    assert (moved[:4] == 0).all() and moved[4] > 1e-3
    assert not Hierarchy(low=low, high=small().high, memory="sequence").causal
    with pytest.raises(ValueError, match="does not stream"):
        layer.init_state(2)


def test_errors_say_what_would_work():
    layer = small().build()
    with pytest.raises(ValueError, match="33 samples do not fill chunks of 5; cut to 30, pad to 35"):
        layer(torch.zeros(1, 33, 12))
    with pytest.raises(ValueError, match=r"does not use info\.dt"):
        layer(torch.zeros(1, 35, 12), info=Info(dt=torch.ones(1, 35)))
    with pytest.raises(ValueError, match="at least 1 sample"):
        Hierarchy(low=small().low, high=small().high, chunk=0)


def test_it_stands_where_a_stack_does():
    spec = SequenceModel(stem=SeriesStem(channels=3), stack=small(), head=TokenHead(classes=2, tie=False))
    assert from_dict(to_dict(spec, KINDS), KINDS) == spec
    model = spec.build()
    assert len(model.stack.blocks) == len(spec.stack.blocks) == 4
    assert model(torch.randn(2, TOTAL, 3)).logits.shape == (2, CHUNKS, 2)
    assert model(torch.randn(2, 7, 3), state=model.init_state(2)).logits.shape == (2, 2, 2)
    model.stack.checkpointing = True
    model.train()(torch.randn(2, TOTAL, 3)).logits.sum().backward()
    pooled = SequenceModel(stem=SeriesStem(channels=3), stack=small(), head=PooledHead(classes=4)).build().double()
    x, ids = _draw(2, TOTAL, 3), torch.ones(2, TOTAL, dtype=torch.int64)
    ids[:, 20:] = 0
    with torch.no_grad():
        torch.testing.assert_close(pooled(x, info=Info(segments=ids)).logits, pooled(x[:, :20]).logits, **EXACT)


def test_series_before_a_model():
    x = torch.tensor([[[1.0, 5000.0], [3.0, -5000.0], [2.0, 0.0]]])
    assert with_deltas(x).tolist() == [[[1, 3000, 0, 0], [3, -3000, 2, -3000], [2, 0, -1, 3000]]]
    assert increments(x)[0, :, 0].tolist() == [0, 2, -1] and displacements(x)[0, :, 0].tolist() == [0, 2, 1]
    values, real = torch.randn(4, 50, 3), torch.rand(4, 50) > 0.3
    scale = Scale.fit(values, real=real, times=3.0)
    torch.testing.assert_close(scale.undo(scale.apply(values)), values)
    torch.testing.assert_close(scale.apply(values)[real].std(0, correction=0), torch.full((3,), 1 / 3))
    still = Scale.fit(torch.ones(2, 5, 1))
    assert still.apply(torch.ones(2, 5, 1)).eq(0).all()
    turned = rotate(torch.tensor([[[1.0, 0.0, 7.0]]]), torch.tensor([torch.pi / 2]))
    torch.testing.assert_close(turned, torch.tensor([[[0.0, 1.0, 7.0]]]))


def test_masked_error_and_drift():
    y, target = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    real = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    broken = torch.where(real[..., None], target, torch.nan)
    want = torch.cat([(y - target)[0], (y - target)[1, :2]]).square().mean()
    torch.testing.assert_close(squared_error(y, broken, real), want)
    torch.testing.assert_close(squared_error(y, target), (y - target).square().mean())
    far = (y - target).cumsum(1).norm(dim=-1)
    torch.testing.assert_close(drift(y, broken, real), far[real].mean())

"""The captured step of decoding, as far as a machine without a CUDA device shows it: what is replayed here is a function."""

from __future__ import annotations

import logging

import pytest
import torch

from seqloom.core import BadInput
from seqloom.core import state as st
from seqloom.generate import Decoder, Ring, generate, graph, stream
from seqloom.generate.graph import NotCaptured, StepGraph
from seqloom.mixers import MIXERS, DeltaNet, LinearAttention, SoftmaxAttention
from seqloom.models import Block, Stack
from seqloom.models.sequence import language_model
from seqloom.parts import SwiGLU

VOCAB = 41
STREAMS = [(key, name) for key, spec in MIXERS.items() for name, given in spec.examples.items() if spec(**given).streams]


def make(*mixers):
    blocks = tuple(Block(mixer=mixer, mlp=SwiGLU(hidden=40)) for mixer in mixers)
    model = language_model(vocab=VOCAB, stack=Stack(dim=32, blocks=blocks), tie=False).build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompt(tokens, rows=2):
    return torch.randint(0, VOCAB, (rows, tokens))


class Replay:
    """Stands for a CUDA graph: remembers what to do with which tensors, and does it when replayed."""

    def __init__(self, step, x):
        self.step, self.x, self.y, self.replays = step, x, None, 0

    def replay(self):
        self.replays += 1
        y = self.step(self.x)
        self.y.copy_(y)


@pytest.fixture
def captured(monkeypatch):
    """Decoders that capture, on a CPU."""

    def capture(step, x, stream):
        recorded = Replay(step, x)
        recorded.y = torch.full((x.shape[0], VOCAB), torch.nan)
        return recorded, recorded.y

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(Decoder, "_graph", lambda self, wanted: None if wanted is False else StepGraph(
        lambda ids: self._read(_piece(ids)), lambda: self.state, self.model))
    monkeypatch.setattr(Decoder, "must_capture", True, raising=False)


def _piece(ids):
    from seqloom.generate import Piece

    return Piece(ids)


@pytest.mark.parametrize(("key", "name"), STREAMS)
def test_a_step_leaves_every_tensor_of_a_donated_state_where_it_was(key, name):
    model = make(MIXERS[key](**MIXERS[key].examples[name]))
    decoder = Decoder(model, batch=2, capacity=12)
    places = graph.addresses(decoder.state)
    for _ in range(4):
        decoder.read(prompt(1))
        assert graph.addresses(decoder.state) == places


@pytest.mark.parametrize(("key", "name"), STREAMS)
def test_a_reset_state_is_that_before_any_token_in_its_old_place(key, name):
    model = make(MIXERS[key](**MIXERS[key].examples[name]))
    decoder = Decoder(model, batch=2, capacity=12)
    places = graph.addresses(decoder.state)
    decoder.read(prompt(7))
    decoder.reset()
    assert graph.addresses(decoder.state) == places and decoder.length == 0
    for got, want in zip(st.leaves(decoder.state), st.leaves(model.init_state(2, 12)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_replayed_steps_give_the_same_tokens_scores_and_states(captured):
    model = make(DeltaNet(heads=2), SoftmaxAttention(heads=2), LinearAttention(heads=2))
    ids = prompt(9)
    pads = torch.ones_like(ids)
    pads[1, :4] = 0
    for settings in ({}, {"temperature": 0.8, "seed": 1}, {"segments": pads, "repetition_penalty": 1.3}, {"stop": [3, 5]}):
        with_graph, without = (generate(model, ids, max_new_tokens=12, graph=on, **settings) for on in (None, False))
        assert with_graph == without
    one, two = Decoder(model, 2, capacity=30, graph=False), Decoder(model, 2, capacity=30)
    for t in range(9):
        a, b = one.read(ids[:, t : t + 1]), two.read(ids[:, t : t + 1])
        assert torch.equal(a, b)
        assert all(map(torch.equal, st.leaves(one.state), st.leaves(two.state)))
    assert two.graph.captures == 1 and two.graph._graph.replays == 8


def test_scores_of_a_step_are_not_overwritten_by_the_next(captured):
    decoder = Decoder(make(LinearAttention(heads=2)), 2)
    for _ in range(2):
        decoder.read(prompt(1))
    first = decoder.read(prompt(1))
    kept = first.clone()
    decoder.read(prompt(1))
    assert torch.equal(first, kept)


def test_a_decoder_used_again_keeps_its_graph(captured):
    model = make(LinearAttention(heads=2), SoftmaxAttention(heads=2, window=5))
    decoder = Decoder(model, 2)
    for _ in range(3):
        ids = prompt(6)
        assert generate(model, ids, max_new_tokens=8, decoder=decoder) == generate(model, ids, max_new_tokens=8, graph=False)
    assert decoder.graph.captures == 1


def test_stepping_back_keeps_the_graph(captured):
    model = make(SoftmaxAttention(heads=2), DeltaNet(heads=2))
    ids = prompt(12)
    decoder = Decoder(model, 2, capacity=20, ring=Ring(keep=3, every=4))
    plain = Decoder(model, 2, capacity=20, ring=Ring(keep=3, every=4), graph=False)
    for each in (decoder, plain):
        for t in range(9):
            each.read(ids[:, t : t + 1])
        each.crop(6)
        for t in range(3, 12):
            scores = each.read(ids[:, t : t + 1])
        each.scores = scores
    assert torch.equal(decoder.scores, plain.scores) and decoder.graph.captures == 1


def test_parameters_that_move_are_captured_anew(captured):
    model = make(LinearAttention(heads=2))
    decoder = Decoder(model, 2)
    for _ in range(3):
        decoder.read(prompt(1))
    first = next(model.parameters())
    first.data = first.data.clone()
    for _ in range(3):
        decoder.read(prompt(1))
    assert decoder.graph.captures == 2


def test_a_full_cache_is_refused_before_the_device_sees_it(captured):
    decoder = Decoder(make(SoftmaxAttention(heads=2)), 2, capacity=4)
    for _ in range(4):
        decoder.read(prompt(1))
    with pytest.raises(BadInput, match="room for 4 tokens"):
        decoder.read(prompt(1))


def test_what_cannot_be_captured_is_said_and_read_step_by_step(captured, monkeypatch, caplog):
    def refuse(step, x, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graph, "capture", refuse)
    monkeypatch.setattr(graph, "_said", set())
    monkeypatch.setattr(Decoder, "must_capture", False)
    model = make(LinearAttention(heads=2))
    ids = prompt(6)
    with caplog.at_level(logging.INFO, "seqloom.generate"):
        got = generate(model, ids, max_new_tokens=6)
    assert got == generate(model, ids, max_new_tokens=6, graph=False)
    assert [record.message for record in caplog.records] == [
        "decoding runs step by step: RuntimeError: operation not permitted when stream is capturing"
    ]
    monkeypatch.setattr(Decoder, "must_capture", True)
    with pytest.raises(BadInput, match="graph=True: RuntimeError"):
        generate(model, ids, max_new_tokens=6)


def test_a_state_that_moves_is_not_captured_and_its_step_is_not_lost():
    model = make(SoftmaxAttention(heads=2))
    decoder = Decoder(model, 2)  # grows
    step = StepGraph(lambda ids: decoder._read(_piece(ids)), lambda: decoder.state, model)
    with torch.no_grad(), pytest.raises(NotCaptured, match="other addresses") as found:
        step(prompt(1))
    assert found.value.ran.shape == (2, VOCAB)


def test_a_graph_is_asked_for_where_there_can_be_none(caplog, monkeypatch):
    monkeypatch.setattr(graph, "_said", set())
    model = make(LinearAttention(heads=2))
    with pytest.raises(BadInput, match="needs a CUDA device, and the model is on cpu"):
        Decoder(model, graph=True)
    with caplog.at_level(logging.INFO, "seqloom.generate"):
        list(stream(model, [1, 2], max_new_tokens=2))
        list(stream(model, [1, 2], max_new_tokens=2))
    assert len(caplog.records) == 1 and "step by step" in caplog.text


def test_a_decoder_of_other_rows_or_of_another_model_is_refused():
    model = make(SoftmaxAttention(heads=2))
    with pytest.raises(BadInput, match="another model"):
        stream(model, [1, 2], decoder=Decoder(make(LinearAttention(heads=2))))
    with pytest.raises(BadInput, match="2 rows side by side"):
        stream(model, [1, 2], decoder=Decoder(model, 2))
    with pytest.raises(BadInput, match="room for 5 tokens"):
        stream(model, [1, 2], max_new_tokens=9, decoder=Decoder(model, capacity=5))

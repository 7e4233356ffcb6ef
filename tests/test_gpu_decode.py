"""Decoding by captured graphs on a CUDA device: the same numbers as without. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from seqloom.core import state as st
from seqloom.core.marks import cast
from seqloom.generate import Decoder, generate
from seqloom.mixers import MIXERS
from seqloom.models import Block, Stack
from seqloom.models.sequence import language_model
from seqloom.parts import SwiGLU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]
STREAMS = [(key, name) for key, spec in MIXERS.items() for name, given in spec.examples.items() if spec(**given).streams]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("key", "name"), STREAMS)
def test_a_replayed_graph_gives_the_same_tokens_scores_and_states(key, name, dtype):
    block = Block(mixer=MIXERS[key](**MIXERS[key].examples[name]), mlp=SwiGLU(hidden=64))
    model = cast(language_model(vocab=97, stack=Stack(dim=32, blocks=(block, block))).build().eval().cuda(), dtype)
    ids = torch.randint(97, (3, 20), device="cuda")
    pads = torch.ones_like(ids)
    pads[1, :7] = 0
    for settings in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}, {"segments": pads}):
        with_graph, without = (generate(model, ids, max_new_tokens=10, graph=on, **settings) for on in (True, False))
        assert with_graph == without
    one, two = Decoder(model, 3, capacity=64, graph=False), Decoder(model, 3, capacity=64, graph=True)
    for t in range(8):
        assert torch.equal(one.read(ids[:, t : t + 1]), two.read(ids[:, t : t + 1]))
        assert all(map(torch.equal, st.leaves(one.state), st.leaves(two.state)))
    assert two.graph.captures == 1


@pytest.mark.parametrize("batch", [1, 64, 256])
def test_any_batch_is_captured(batch):
    block = Block(mixer=MIXERS["gated_linear"](heads=2), mlp=SwiGLU(hidden=64))
    model = language_model(vocab=97, stack=Stack(dim=64, blocks=(block, block))).build().eval().cuda()
    ids = torch.randint(97, (batch, 5), device="cuda")
    assert generate(model, ids, max_new_tokens=6, graph=True) == generate(model, ids, max_new_tokens=6, graph=False)

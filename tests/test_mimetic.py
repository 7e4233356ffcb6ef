"""Mimetic initialisation as a setting of a stack: stored, applied once, and what it refuses."""

import json

import pytest
import torch

from seqloom.core.spec import pack, unpack
from seqloom.hub import SeqloomForCausalLM, wrap
from seqloom.mixers import DiffMamba, GatedLinearAttention, Mamba, Mamba2, SoftmaxAttention
from seqloom.models import KINDS, Block, MimeticInit, Stack, mimetic_init_
from seqloom.models.sequence import language_model

MIXERS = {
    "mamba": Mamba(state=4),
    "mamba2": Mamba2(state=8, head_dim=16),
    "gated_linear": GatedLinearAttention(heads=2, conv=3),
    "scalar": GatedLinearAttention(heads=2, decay="scalar"),
}


def stack(*mixers, **settings):
    return Stack(dim=32, blocks=tuple(Block(mixer=mixer) for mixer in mixers), **settings)


@pytest.mark.parametrize("name", MIXERS)
def test_the_second_of_every_two_layers_is_set_and_reported(name):
    spec = stack(*(MIXERS[name],) * 4)
    torch.manual_seed(0)
    plain = language_model(vocab=7, stack=spec).build()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    touched = mimetic_init_(plain)
    changed = {key for key, value in plain.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(touched) and {key.split(".")[2] for key in touched} == {"1", "3"}


def test_layers_inside_a_mixer_are_found():
    model = stack(SoftmaxAttention(heads=2), DiffMamba(mixer=MIXERS["mamba2"]), init=MimeticInit(layers=(1,))).build()
    for inner in (model.blocks[1].mixer.mixer_1, model.blocks[1].mixer.mixer_2):
        assert torch.equal(inner.A_log, torch.full_like(inner.A_log, -8.0))


def test_a_second_scan_without_a_convolution_of_its_own_is_set_too():
    mixer = DiffMamba(mixer=MIXERS["mamba"], double="scan")
    model = stack(SoftmaxAttention(heads=2), mixer, init=MimeticInit(layers=(1,), conv=True)).build()
    rates = [value for name, value in model.blocks[1].mixer.named_parameters() if name.endswith("A_log")]
    assert len(rates) == 2 and all(torch.equal(value, torch.full_like(value, -8.0)) for value in rates)


def test_a_saved_model_keeps_what_was_trained_and_not_the_start(tmp_path):
    spec = language_model(vocab=11, stack=stack(*(MIXERS["mamba2"],) * 2, init=MimeticInit(c=5.0)))
    assert unpack(json.loads(json.dumps(pack(spec, KINDS))), KINDS) == spec
    layer = spec.build()
    assert layer.stack.blocks[1].mixer.A_log[0].item() == -5.0
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    wrap(layer, pad_token_id=0).save_pretrained(tmp_path)
    loaded = SeqloomForCausalLM.from_pretrained(tmp_path)
    for name, value in layer.stack.state_dict().items():
        assert torch.equal(loaded.model.stack.state_dict()[name], value), name


@pytest.mark.parametrize(("make", "words"), [
    (lambda: stack(MIXERS["mamba"], init=MimeticInit()), "name the blocks by layers"),
    (lambda: stack(SoftmaxAttention(heads=2), init=MimeticInit()), "of 1 blocks 0"),
    (lambda: stack(SoftmaxAttention(heads=2), MIXERS["mamba"], init=MimeticInit(layers=(0,))), "block 0 has nothing to set"),
    (lambda: stack(*(Mamba2(head_dim=16, dt_limit=(0.0, 0.5)),) * 2, init=MimeticInit()), "dt_limit"),
    (lambda: stack(MIXERS["mamba"], init=MimeticInit(mix=1.5)), "mix is the share"),
])
def test_what_cannot_be_set_is_said(make, words):
    with pytest.raises(ValueError, match=words):
        make().build()

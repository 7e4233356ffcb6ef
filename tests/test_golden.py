"""Every mixer, in every form, gives the numbers of an independent NumPy loop (tests/golden/make_<key>.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from seqloom.core import BuildContext, from_dict, runnable, use_form
from seqloom.mixers import MIXERS
from seqloom.models import KINDS

GOLDEN = Path(__file__).parent / "golden"


def read(key):
    with safe_open(GOLDEN / f"{key}.safetensors", "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    spec = from_dict({"kind": key, **json.loads(facts["settings"])}, KINDS)
    layer = spec.build(BuildContext(dim=int(facts["dim"]))).double()
    parameters = {name.removeprefix("layer."): value for name, value in tensors.items() if name.startswith("layer.")}
    layer.load_state_dict({name: parameters[name].reshape(value.shape) for name, value in layer.state_dict().items()})
    assert set(parameters) == set(layer.state_dict())
    return layer, tensors["x"], tensors["y"]


@pytest.mark.parametrize(("key", "form"), [(key, form) for key in MIXERS for form in runnable(
    (MIXERS[key](heads=2) if "heads" in MIXERS[key].__dataclass_fields__ else MIXERS[key]()).forms, "cpu")])
def test_golden_numbers(key, form):
    layer, x, y = read(key)
    with use_form(form), torch.no_grad():
        torch.testing.assert_close(layer(x).y, y, rtol=1e-9, atol=1e-9)

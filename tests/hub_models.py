"""Small models in transformers' clothes, which the tests of the hub share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from seqloom.hub import SeqloomForCausalLM, wrap
from seqloom.mixers import MIXERS, GatedDeltaNet, LinearAttention, SoftmaxAttention
from seqloom.models import Block, Stack
from seqloom.models.presets import mixer_for
from seqloom.models.sequence import language_model
from seqloom.parts import SwiGLU

VOCAB, WIDTH = 61, 32
CHECKPOINTS = Path(__file__).parent / "checkpoints"
HYBRID = (GatedDeltaNet(heads=2), SoftmaxAttention(heads=4, kv_heads=2), LinearAttention(heads=2, conv=3))
CAUSAL = [name for name in MIXERS if mixer_for(name, WIDTH).causal]
ALL = {"hybrid": HYBRID, **{name: (mixer_for(name, WIDTH),) * 2 for name in CAUSAL}}


def spec_of(mixers=HYBRID, *, tie: bool = True, dropout: float = 0.0):
    blocks = tuple(Block(mixer=mixer, mlp=SwiGLU(hidden=40), dropout=dropout) for mixer in mixers)
    return language_model(vocab=VOCAB, stack=Stack(dim=WIDTH, blocks=blocks), tie=tie)


def layer_of(mixers=HYBRID, *, dtype: torch.dtype = torch.float64, **settings):
    """A plain model with scores spread out, so that no two tokens are near a tie."""
    layer = spec_of(mixers, **settings).build().to(dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def model_of(mixers=HYBRID, **settings) -> SeqloomForCausalLM:
    return wrap(layer_of(mixers, **settings), pad_token_id=0)


def saved(model, tmp_path) -> Path:
    """The fixture of a folder with the fixture `model`."""
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return ids, mask


def close(got, want, tolerance: float = 1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def made(model, ids, mask=None, new: int = 12, **settings) -> list[list[int]]:
    settings = {"do_sample": False, **settings}
    out = model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=new, **settings)
    return out[:, ids.shape[1] :].tolist()

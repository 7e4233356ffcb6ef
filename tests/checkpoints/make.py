"""Make the tiny checkpoint of the present format: python tests/checkpoints/make.py. Run once, when a format is released."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from seqloom.core.spec import FORMAT
from seqloom.hub import wrap
from seqloom.mixers import GatedDeltaNet, LinearAttention, SoftmaxAttention
from seqloom.models import Block, Stack
from seqloom.models.sequence import language_model
from seqloom.parts import MLP, SwiGLU


def main() -> None:
    torch.manual_seed(FORMAT)
    blocks = (
        Block(mixer=GatedDeltaNet(heads=2), mlp=SwiGLU(hidden=8)),
        Block(mixer=SoftmaxAttention(heads=2, window=5), mlp=None),
        Block(mixer=LinearAttention(heads=2), mlp=MLP(hidden=8), norm="layer"),
    )
    model = wrap(language_model(vocab=16, stack=Stack(dim=8, blocks=blocks)).build().eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = Path(__file__).parent / f"format-{FORMAT}"
    model.save_pretrained(folder)
    ids = torch.randint(0, 16, (2, 12))
    expected = {"ids": ids.tolist(), "logits": model(ids).logits.tolist()}
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main()

"""`seqloom generate`: continue a prompt, token by token, in constant memory where the model's state is constant."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqloom.cli.options import at_least, device_of, parse
from seqloom.core import BadInput


@dataclass
class GenerateOptions:
    """Continue a prompt with a trained model."""

    model: Path
    """Folder of a trained model."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 200
    """Most tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 is all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    device: str = "cpu"


def main(argv: list[str]) -> None:
    from seqloom import hub

    options = parse(GenerateOptions, argv, verb="generate")
    at_least(1, tokens=options.tokens)
    device = device_of(options.device)
    model, tokenizer = hub.load(options.model)
    model.to(device).eval()
    if tokenizer is None:
        raise BadInput(f"{options.model} has no tokenizer.json, so it cannot read a prompt")
    sys.stdout.write(options.prompt)
    for text in continuation(model, tokenizer, options.prompt, tokens=options.tokens, temperature=options.temperature,
                             top_k=options.top_k, top_p=options.top_p, seed=options.seed):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()


def continuation(model: Any, tokenizer: Any, prompt: str, *, tokens: int, **settings: Any) -> Iterator[str]:
    """Text of each new token as soon as its bytes are whole."""
    import torch

    from seqloom.data.tokenizer import START
    from seqloom.generate import stream

    start = tokenizer.token_to_id(START)
    ids = ([] if start is None else [start]) + tokenizer.encode(prompt, add_special_tokens=False).ids
    made: list[int] = []
    shown = ""
    stop = () if start is None else (start,)
    prompts = torch.tensor([ids], device=next(model.parameters()).device)
    for step in stream(model, prompts, max_new_tokens=tokens, stop=stop, **settings):
        if bool(step.done) and int(step.ids) in stop:
            return
        made.append(int(step.ids))
        text = tokenizer.decode(made)
        if not text.endswith("\ufffd"):  # the bytes of a character may be spread over tokens
            yield text[len(shown) :]
            shown = text
            if len(made) > 32:
                made, shown = made[-1:], tokenizer.decode(made[-1:])

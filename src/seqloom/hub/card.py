"""The model card that is written beside a saved model: what it is, what it was made from, how well it does, how to load it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from seqloom._version import __version__
from seqloom.models import SequenceModel


def model_card(model: nn.Module, spec: SequenceModel, *, name: str, auto_class: str, facts: Mapping[str, Any] | None = None,
               tokenizer: bool = True) -> str:
    """A README.md in the form of the Hugging Face hub. `facts` are printed as they are: data, steps, bits per byte, ..."""
    mixers = Counter(type(block.mixer).__name__ for block in spec.stack.blocks)
    keys = sorted({block.mixer.key for block in spec.stack.blocks})
    state = model.get_submodule("model.stack")
    lines = [
        "---", "library_name: transformers", f"tags: {json.dumps(['seqloom', *keys])}",
        *(["pipeline_tag: text-generation"] if auto_class == "AutoModelForCausalLM" else []), "---", "",
        f"# {name}", "",
        f"A sequence model of {len(spec.stack.blocks)} blocks at width {spec.stack.dim}, made with seqloom {__version__}.", "",
        "| | |", "|---|---|",
        f"| Parameters | {sum(p.numel() for p in model.parameters()):,} |",
        f"| Vocabulary | {spec.stem.vocab:,} |",
        f"| Mixers | {', '.join(f'{count} x {mixer}' for mixer, count in mixers.items())} |",
    ]
    if spec.stack.causal:
        short, long = state.state_bytes(512), state.state_bytes(8192)
        size = f"{short:,} bytes, whatever the length" if short == long else f"{short:,} bytes at 512 tokens, {long:,} at 8,192"
        lines.append(f"| State while decoding | {size} |")
    lines += [f"| {_capital(key)} | {value:,} |" if isinstance(value, int) else f"| {_capital(key)} | {value} |"
              for key, value in (facts or {}).items()]
    lines += [
        "", "## How to load", "", "```python", "import seqloom.hub  # registers the classes",
        f"from transformers import {auto_class}{', AutoTokenizer' if tokenizer else ''}", "",
        f'model = {auto_class}.from_pretrained("{name}")',
        *([f'tokenizer = AutoTokenizer.from_pretrained("{name}")'] if tokenizer else []),
    ]
    if auto_class == "AutoModelForCausalLM" and tokenizer:
        lines += ['prompt = tokenizer("Once", return_tensors="pt")',
                  "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))"]
    return "\n".join([*lines, "```", ""])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

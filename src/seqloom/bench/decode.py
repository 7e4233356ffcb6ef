"""Decoding: tokens a second after a context, beside softmax attention of the same size and code, and the bytes of the state.

On a CUDA device the steps are replays of a captured graph (`generate/graph.py`). The floor of a step is what it must move:
every weight once, a growing cache read once, a constant state read and written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqloom.bench.timing import attempt, interleave, rates
from seqloom.core import Spec
from seqloom.core import state as st
from seqloom.core.marks import cast
from seqloom.generate import Decoder
from seqloom.mixers import MIXERS, SoftmaxAttention
from seqloom.models import Block, Stack
from seqloom.models.presets import HEAD_DIM, mixer_for
from seqloom.models.sequence import language_model
from seqloom.parts import SwiGLU

Row = dict[str, Any]
SOFTMAX, FEWER = "softmax", "softmax, kv heads / 4"
CHUNK = 512


def arms(mixers: list[str], dim: int) -> dict[str, Spec]:
    """Softmax with as many key and value heads as query heads, with 4 times fewer, and the mixers that stream."""
    heads = max(dim // HEAD_DIM, 1)
    found: dict[str, Spec] = {SOFTMAX: mixer_for("softmax", dim)}
    if heads % 4 == 0:
        found[FEWER] = SoftmaxAttention(heads=heads, kv_heads=heads // 4)
    return found | {name: mixer_for(name, dim) for name in mixers if name != SOFTMAX and mixer_for(name, dim).streams}


def decode(mixers: list[str] | None = None, *, rounds: int = 5, contexts: tuple[int, ...] = (512, 8192), batch: int = 1,
           steps: int = 32, dim: int = 256, depth: int = 4, vocab: int = 256, device: str = "cpu",
           dtype: torch.dtype | None = None) -> list[Row]:
    """One-token steps after each context. `speed_kept`: of the speed after the first context; `times_softmax`,
    `times_fewer`: softmax's time a step over ours, with as many key and value heads as query heads and with 4 times fewer."""
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    rows: list[Row] = []
    size = (rounds, batch, steps, dim, depth, vocab, device, dtype)
    for name, spec in arms(list(MIXERS) if mixers is None else mixers, dim).items():
        found = attempt(name, partial(_mixer, name, spec, contexts, *size))
        rows += found.get("rows", [found])
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    for row in rows:
        for key, arm in (("times_softmax", SOFTMAX), ("times_fewer", FEWER)):
            other = next((each for each in rows if each["name"] == arm and each.get("context") == row.get("context")), {})
            if "seconds" in row and "seconds" in other:
                row[key] = other["seconds"] / row["seconds"]
    for context in contexts:
        rows.append(attempt("transformers Llama", partial(_llama, context, *size)))
    return rows


def _mixer(name: str, spec: Spec, contexts: tuple[int, ...], rounds: int, batch: int, steps: int, dim: int, depth: int,
           vocab: int, device: str, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    block = Block(mixer=spec, mlp=SwiGLU())
    model = language_model(vocab=vocab, stack=Stack(dim=dim, blocks=(block,) * depth)).build().to(device).eval()
    cast(model, dtype)
    calls: dict[str, Callable[[], object]] = {}
    facts: dict[str, Row] = {}
    keep: list[Decoder] = []
    for context in contexts:
        if torch.device(device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        decoder = Decoder(model, batch, capacity=context + (rounds + 2) * steps + 4, chunk=CHUNK)
        keep.append(decoder)
        began = time.perf_counter()
        ids = torch.randint(vocab, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)
        box = [decoder.read(ids).argmax(-1)]
        _wait(device)
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(3):
            box[0] = decoder.read(box[0][:, None]).argmax(-1)
        _wait(device)
        setup = time.perf_counter() - began

        def run(decoder: Decoder = decoder, box: list[Tensor] = box) -> None:
            for _ in range(steps):
                box[0] = decoder.read(box[0][:, None]).argmax(-1)

        calls[str(context)] = run
        moved = sum(p.numel() * p.element_size() for p in model.parameters())
        moved += st.count_bytes(decoder.state) * (2 if spec.constant_state else 1)
        facts[str(context)] = {
            "state_bytes": model.state_bytes(context, batch), "constant_state": spec.constant_state,
            "floor_seconds": moved / (rates(device, dtype)["bytes"]), "graph": decoder.graph is not None,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.device(device).type == "cuda" else None,
            "prefill_seconds": prefill, "setup_seconds": setup,
        }
    timings = interleave(calls, rounds=rounds)
    first, rows = timings[str(contexts[0])].median, []
    for context in contexts:
        seconds, fact = timings[str(context)].median / steps, facts[str(context)]
        rows.append({"name": name, "batch": batch, "context": context, "tokens_per_second": batch / seconds,
                     "speed_kept": first / timings[str(context)].median, "seconds": seconds,
                     "times_softmax": None, "times_fewer": None, "times_floor": seconds / fact["floor_seconds"], **fact})
    return {"rows": rows}


def _llama(context: int, rounds: int, batch: int, steps: int, dim: int, depth: int, vocab: int, device: str,
           dtype: torch.dtype) -> Row:
    """transformers' own, with its growing cache of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(dim // HEAD_DIM, 1)
    config = LlamaConfig(vocab_size=vocab, hidden_size=dim, intermediate_size=dim * 8 // 3, num_hidden_layers=depth,
                         num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
                         max_position_embeddings=2 * context + 4096)
    with torch.inference_mode():
        model = LlamaForCausalLM(config).to(device, dtype).eval()
        ids = torch.randint(vocab, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)
        cache = None
        for start in range(0, context, CHUNK):
            out = model(input_ids=ids[:, start : start + CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
        box = [out.logits[:, -1:].argmax(-1)]

        def run() -> None:
            for _ in range(steps):
                box[0] = model(input_ids=box[0], past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

        seconds = interleave({"run": run}, rounds=rounds)["run"].median / steps
    return {"name": "transformers Llama", "batch": batch, "context": context, "tokens_per_second": batch / seconds,
            "seconds": seconds}


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()

"""At the sizes that a GPU is for: training a hybrid of 350M parameters at 8,192 tokens, and one layer over a million tokens.

    hybrid    24 blocks of width 1,024, three of a linear mixer to one of softmax attention, bfloat16 weights, fused AdamW;
              beside transformers' Llama of the same size. Blocks are compiled, and the loss makes no logits, in both:
              Llama compiled whole, with its own loss, takes three times as long
    million   forward and backward of one layer of width 512 over half a million and a million tokens of one row

Both need a GPU. Every step of `hybrid` reads the same random tokens: losses compare nothing there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqloom.bench import flops
from seqloom.bench.timing import attempt, first, interleave, rates
from seqloom.core import BadInput, BuildContext
from seqloom.core.marks import cast
from seqloom.models.presets import mixer_for, stack_of
from seqloom.models.sequence import language_model
from seqloom.objectives import NextToken, linear_cross_entropy
from seqloom.study.fit import count_parameters

Row = dict[str, Any]
VOCAB, DIM, LAYERS, HIDDEN, TOKENS = 32768, 1024, 24, 2816, 8192
MIXERS = ("gated_linear", "delta")
LLAMA = "transformers Llama"
LONG = ("linear", "retention", "gated_linear", "delta", "gated_delta", "mamba", "mamba2", "hgrn")


def hybrid(mixers: list[str], *, rounds: int = 5, batch: int = 4, tokens: int = TOKENS,
           device: str = "cuda") -> list[Row]:
    """A row for each hybrid and for Llama: tokens a second, the share of the measured matrix-product rate that the model's own
    operations take (`utilisation`), `times_llama`, peak memory."""
    needs_gpu(device, "hybrid")
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (batch, tokens + 1), device=device)
    makers: dict[str, Callable[[Tensor], tuple[nn.Module, Callable[[], None], float]]] = {
        f"{name}, {name}, {name}, softmax": partial(_ours, name) for name in mixers}
    makers[LLAMA] = _llama
    rows, steps, facts = [], {}, {}

    def ready(name: str) -> Row:
        model, step, operations = makers[name](ids)
        start = first(step)
        for _ in range(2):
            step()
        steps[name], facts[name] = step, (model, operations, start)
        return {}

    for name in makers:
        row = attempt(name, partial(ready, name))
        if row:
            rows.append(row)
    timings, top = interleave(steps, rounds=rounds), rates(device, torch.bfloat16)["operations"]
    for name, timing in timings.items():
        model, operations, start = facts[name]
        rows.append({
            "name": name, "batch": batch, "tokens": tokens, "tokens_per_second": batch * tokens / timing.median,
            "seconds": timing.median, "seconds_range": [timing.least, timing.most],
            "utilisation": operations * batch * tokens / timing.median / top,
            "times_llama": timings[LLAMA].median / timing.median if LLAMA in timings else None,
            "setup_seconds": start.seconds, "peak_gib": start.peak_gib, "parameters": count_parameters(model),
            "matrix_product_rate": top})
    return rows


def _ours(name: str, ids: Tensor) -> tuple[nn.Module, Callable[[], None], float]:
    stack = stack_of((name, name, name, "softmax"), dim=DIM, layers=LAYERS, hidden=HIDDEN)
    model = language_model(vocab=VOCAB, stack=stack).build().to(ids.device)
    cast(model, torch.bfloat16)
    for block in model.stack.blocks:
        block.compile()
    objective = NextToken(model)
    operations = flops.of_model(model, ids.shape[1] - 1).training
    return model, _step(model, lambda: objective(ids[:, :-1], ids[:, 1:], keep_state=False).total), operations


def _llama(ids: Tensor) -> tuple[nn.Module, Callable[[], None], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = ids.shape[1] - 1
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=DIM, intermediate_size=HIDDEN + DIM // 8, num_hidden_layers=LAYERS,
                         num_attention_heads=DIM // 64, num_key_value_heads=DIM // 64, max_position_embeddings=tokens,
                         tie_word_embeddings=True, use_cache=False)
    model = LlamaForCausalLM(config).to(ids.device, torch.bfloat16)
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    operations = 3 * (2.0 * weights + LAYERS * 4.0 * DIM * flops.keys_seen(tokens, True, None))
    for block in model.model.layers:
        block.compile()

    def loss() -> Tensor:
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten()) / ids[:, 1:].numel()

    return model, _step(model, loss), operations


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One step of training: loss, gradients, update."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return step


def million(mixers: list[str], *, rounds: int = 2, dim: int = 512, lengths: tuple[int, ...] = (2**19, 2**20),
            device: str = "cuda") -> list[Row]:
    """Seconds and peak memory of one layer, bfloat16, one row; `growth` is memory over that of the first length: 2 where it is
    linear and the length doubles."""
    needs_gpu(device, "million")
    rows: list[Row] = []
    for name in mixers:
        found = attempt(name, partial(_long, name, rounds, dim, lengths, device))
        rows += found.get("rows", [found])
        torch.cuda.empty_cache()
    return rows


def _long(name: str, rounds: int, dim: int, lengths: tuple[int, ...], device: str) -> Row:
    torch.manual_seed(0)
    layer = mixer_for(name, dim).build(BuildContext(dim=dim, depth=1)).to(device)
    cast(layer, torch.bfloat16)
    rows: list[Row] = []
    for tokens in lengths:
        x = torch.randn(1, tokens, dim, device=device, dtype=torch.bfloat16, requires_grad=True)

        def both(x: Tensor = x) -> None:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            layer(x).y.sum().backward()

        start = first(both)
        began = time.perf_counter()
        for _ in range(rounds):
            both()
        torch.cuda.synchronize()
        rows.append({"name": name, "tokens": tokens, "dim": dim, "seconds": (time.perf_counter() - began) / rounds,
                     "peak_gib": start.peak_gib, "setup_seconds": start.seconds,
                     "growth": start.peak_gib / rows[0]["peak_gib"] if rows and start.peak_gib else None})
    return {"rows": rows}


def needs_gpu(device: str, part: str) -> None:
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise BadInput(f"{part} is sized for a GPU: give --device cuda on a machine that has one")

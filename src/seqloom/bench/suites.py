"""The suites: what is timed beside what, as parts that are tables of plain rows.

    kernels   the fused kernels beside PyTorch's attention and flash-linear-attention's                      (a GPU)
    layers    one layer of every mixer beside SDPA softmax; the cost of packing
    models    training steps of whole models beside transformers and x-transformers; Mamba; growth with length
    decode    tokens a second after a context, the state's bytes
    scale     training a hybrid of 350M parameters; one layer over a million tokens                         (a GPU)

A part is written to a file of its own name.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from seqloom.bench import flops, scale
from seqloom.bench import models as zoo
from seqloom.bench.decode import decode
from seqloom.bench.kernels import kernels
from seqloom.bench.layers import layers, segments
from seqloom.bench.timing import First, Timing, attempt, first, interleave, rates
from seqloom.core import BadInput
from seqloom.core.marks import cast
from seqloom.mixers import MIXERS
from seqloom.study.fit import count_parameters

Row = dict[str, Any]


def _row(name: str, shape: tuple[int, int], timing: Timing, start: First, model: torch.nn.Module, floor: float | None,
         **facts: Any) -> Row:
    tokens = shape[0] * shape[1]
    return {
        "name": name,
        "batch": shape[0],
        "tokens": shape[1],
        "tokens_per_second": tokens / timing.median,
        "seconds": timing.median,
        "seconds_range": [timing.least, timing.most],
        **facts,
        "floor_seconds": floor,
        "times_floor": None if floor is None else timing.median / floor,
        "peak_gib": start.peak_gib,
        "setup_seconds": start.seconds,
        "parameters": count_parameters(model),
    }


def _floor(model: torch.nn.Module, shape: tuple[int, int], device: str, dtype: torch.dtype) -> float | None:
    """Seconds that the model operations of a training step take at the measured rate; None where they are not counted."""
    try:
        count = flops.of_model(model, shape[1])
    except (BadInput, AttributeError):  # a mixer whose operations are not counted, or another library's model
        return None
    return count.training * shape[0] * shape[1] / rates(device, dtype)["operations"]


def _time_models(makers: dict[str, Callable], shape: tuple[int, int], rounds: int, against: str, device: str = "cpu",
                 dtype: torch.dtype | None = None) -> list[Row]:
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    ids = zoo.tokens(shape).to(device)
    steps: dict[str, Callable] = {}
    made: dict[str, tuple[torch.nn.Module, First]] = {}
    rows: list[Row] = []

    def ready(name: str) -> Row:
        torch.manual_seed(0)
        model, logits = makers[name]()
        cast(model.to(device), dtype)
        step = zoo.step_of(model.train(), ids, logits)
        made[name] = model, first(step)
        steps[name] = step
        return {}

    for name in makers:
        row = attempt(name, partial(ready, name))
        if row:
            rows.append(row)
    timings = interleave(steps, rounds=rounds)
    base = timings[against].median if against in timings else None
    for name, timing in timings.items():
        model, start = made[name]
        rows.append(_row(name, shape, timing, start, model, _floor(model, shape, device, dtype), against=against,
                         speedup=None if base is None else base / timing.median))
    gc.collect()
    return rows


def training(mixers: list[str], *, rounds: int = 5, shapes: tuple[tuple[int, int], ...] = ((4, 512), (1, 4096)),
             **where: Any) -> list[Row]:
    """Four-layer language models of width 256: ours by mixer, transformers' Llama, x-transformers. Baseline: Llama."""
    rows = []
    for shape in shapes:
        makers = {"transformers Llama": zoo.transformers_llama, "x-transformers": zoo.x_transformers}
        makers |= {name: partial(zoo.ours, name) for name in mixers}
        rows += _time_models(makers, shape, rounds, "transformers Llama", **where)
    return rows


def state_space(mixers: list[str], *, rounds: int = 3, **where: Any) -> list[Row]:
    """Mamba and Mamba-2, where they are asked for, beside transformers' own, same blocks and sizes."""
    rows = []
    if "mamba" in mixers:
        makers = {"transformers Mamba": zoo.transformers_mamba, "mamba": zoo.our_mamba}
        rows += _time_models(makers, (1, 256), rounds, "transformers Mamba", **where)
    for shape in ((4, 512), (1, 4096)) if "mamba2" in mixers else ():
        rows += _time_models(
            {
                "transformers Mamba-2": zoo.transformers_mamba2,
                "transformers Mamba-2, chunk 64": partial(zoo.transformers_mamba2, chunk=64),
                "mamba2": zoo.our_mamba2,
            },
            shape,
            rounds,
            "transformers Mamba-2",
            **where,
        )
    return rows


def lengths(mixers: list[str], *, rounds: int = 3, spans: tuple[int, ...] = (1024, 4096), **where: Any) -> list[Row]:
    """Training time per token at two lengths; `growth` is relative to the first: 1 where time is linear in T."""
    rows = []
    for name in mixers:
        base = None
        for tokens in spans:
            row = _time_models({name: partial(zoo.ours, name, layers=2)}, (1, tokens), rounds, name, **where)[0]
            if "seconds" in row:
                per_token = row["seconds"] / tokens
                base = base or per_token
                row["growth"] = per_token / base
            rows.append(row)
    return rows


# suite -> part -> rows of it; a part is the name of its file
SUITES: dict[str, dict[str, Callable[..., list[Row]]]] = {
    "kernels": {"kernels": kernels},
    "layers": {"layers": layers, "segments": segments},
    "models": {"training": training, "state-space": state_space, "lengths": lengths},
    "decode": {"decoding": decode},
    "scale": {"hybrid": scale.hybrid, "million": scale.million},
}
GPU = ("kernels", "scale")  # suites that need one
# parts that are not of every mixer unless they are asked for
CHOSEN = {"hybrid": scale.MIXERS, "million": scale.LONG}


def mixers_of(part: str) -> list[str]:
    """The mixers of a part by default."""
    return list(CHOSEN.get(part, MIXERS))


def run(part: str, mixers: list[str] | None = None, **options: Any) -> list[Row]:
    """The rows of a part of any suite."""
    parts = {name: make for suite in SUITES.values() for name, make in suite.items()}
    return parts[part](mixers_of(part) if mixers is None else mixers, **options)

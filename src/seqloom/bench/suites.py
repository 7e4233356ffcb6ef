"""The suites: what is timed beside what, as rows of plain data."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from seqloom.bench import models as zoo
from seqloom.bench.timing import Timing, interleave
from seqloom.core import Info, Mixer
from seqloom.mixers import MIXERS
from seqloom.models.presets import mixer_for, preset
from seqloom.study.fit import count_parameters

Row = dict[str, Any]


def _row(name: str, shape: tuple[int, int], timing: Timing, parameters: int, **facts: Any) -> Row:
    tokens = shape[0] * shape[1]
    return {
        "name": name,
        "batch": shape[0],
        "tokens": shape[1],
        "tokens_per_second": tokens / timing.median,
        "seconds": timing.median,
        "seconds_range": [timing.least, timing.most],
        "parameters": parameters,
        **facts,
    }


def _time_models(makers: dict[str, Callable], shape: tuple[int, int], rounds: int, against: str) -> list[Row]:
    ids = zoo.tokens(shape)
    steps, sizes = {}, {}
    for name, make in makers.items():
        torch.manual_seed(0)
        model, logits = make()
        steps[name], sizes[name] = zoo.step_of(model.train(), ids, logits), count_parameters(model)
    timings = interleave(steps, rounds=rounds)
    base = timings[against].median
    rows = [
        _row(name, shape, timing, sizes[name], against=against, speedup=base / timing.median)
        for name, timing in timings.items()
    ]
    gc.collect()
    return rows


def training(mixers: list[str], *, rounds: int = 5, shapes: tuple[tuple[int, int], ...] = ((4, 512), (1, 4096))) -> list[Row]:
    """Four-layer language models of width 256: ours by mixer, transformers' Llama, x-transformers. Baseline: Llama."""
    rows = []
    for shape in shapes:
        makers = {"transformers Llama": zoo.transformers_llama, "x-transformers": zoo.x_transformers}
        makers |= {name: lambda name=name: zoo.ours(name) for name in mixers}
        rows += _time_models(makers, shape, rounds, "transformers Llama")
    return rows


def state_space(*, rounds: int = 3) -> list[Row]:
    """Mamba and Mamba-2 beside transformers' own, same blocks and sizes."""
    rows = _time_models(
        {"transformers Mamba": zoo.transformers_mamba, "mamba": zoo.our_mamba}, (1, 256), rounds, "transformers Mamba"
    )
    for shape in ((4, 512), (1, 4096)):
        rows += _time_models(
            {
                "transformers Mamba-2": zoo.transformers_mamba2,
                "transformers Mamba-2, chunk 64": lambda: zoo.transformers_mamba2(chunk=64),
                "mamba2": zoo.our_mamba2,
            },
            shape,
            rounds,
            "transformers Mamba-2",
        )
    return rows


def lengths(mixers: list[str], *, rounds: int = 3, spans: tuple[int, ...] = (1024, 4096)) -> list[Row]:
    """Training time per token at two lengths; `growth` is relative to the first: 1 where time is linear in T."""
    rows = []
    for name in mixers:
        first = None
        for tokens in spans:
            row = _time_models({name: lambda name=name: zoo.ours(name, layers=2)}, (1, tokens), rounds, name)[0]
            per_token = row["seconds"] / tokens
            first = first or per_token
            rows.append({**row, "growth": per_token / first})
    return rows


def segments(mixers: list[str], *, rounds: int = 3, tokens: int = 4096, count: int = 64) -> list[Row]:
    """One layer with `count` segments a row beside none: `cost` is the ratio."""
    from seqloom.core import BuildContext

    rows = []
    for name in mixers:
        torch.manual_seed(0)
        layer: Mixer = mixer_for(name, 256).build(BuildContext(dim=256))
        x = torch.randn(1, tokens, 256, requires_grad=True)
        cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: count - 1] + 1
        ids = torch.zeros(1, tokens, dtype=torch.int64).index_fill_(1, cuts, 1).cumsum(1) + 1

        def run(info: Info, layer: Mixer = layer, x: torch.Tensor = x) -> None:
            layer.zero_grad(set_to_none=True)
            layer(x, info=info).y.sum().backward()

        timings = interleave(
            {"none": lambda run=run: run(Info()), "packed": lambda run=run, ids=ids: run(Info(segments=ids))}, rounds=rounds
        )
        rows.append(
            {
                "name": name,
                "tokens": tokens,
                "segments": count,
                "seconds": timings["packed"].median,
                "seconds_without": timings["none"].median,
                "cost": timings["packed"].median / timings["none"].median,
            }
        )
    return rows


@torch.inference_mode()
def decoding(mixers: list[str], *, contexts: tuple[int, ...] = (512, 8192), steps: int = 32, rounds: int = 9) -> list[Row]:
    """Tokens per second of one-token steps after each context; interleaved, so that drift falls on both alike."""
    rows = []
    for name in mixers:
        torch.manual_seed(0)
        model = preset(f"{name}-small", vocab=zoo.VOCAB, dim=256, layers=4).build().eval()
        calls = {}
        for context in contexts:
            state = model.init_state(1, capacity=context + (rounds + 2) * steps)
            for start in range(0, context, 512):
                state = model(zoo.tokens((1, 512), start), state=state, keep=1).state
            box = [state]

            def run(box: list = box) -> None:
                token = torch.zeros(1, 1, dtype=torch.int64)
                for _ in range(steps):
                    output = model(token, state=box[0], donate=True)  # noqa: B023
                    box[0] = output.state
                    token = output.logits[:, -1:].argmax(-1)

            calls[str(context)] = run
        timings = interleave(calls, rounds=rounds)
        first = timings[str(contexts[0])].median
        for context in contexts:
            timing = timings[str(context)]
            rows.append(
                {
                    "name": name,
                    "context": context,
                    "tokens_per_second": steps / timing.median,
                    "speed_kept": first / timing.median,
                    "state_bytes": model.state_bytes(context),
                    "constant_state": mixer_for(name, 256).constant_state,
                }
            )
    return rows


SUITES: dict[str, Callable[..., list[Row]]] = {
    "training": training,
    "state-space": lambda mixers, **options: state_space(**options),
    "lengths": lengths,
    "segments": segments,
    "decoding": decoding,
}


def run(suite: str, mixers: list[str] | None = None, **options: Any) -> list[Row]:
    return SUITES[suite](mixers or list(MIXERS), **options)

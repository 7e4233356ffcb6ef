"""One layer at a time, forward and backward: every mixer beside softmax attention as one would write it with SDPA.

The floor of a row is the larger of two times: its model operations (`flops.py`) over the measured rate of a matrix product, and
the bytes of inputs, outputs, their gradients and the weights, each moved once, over the measured rate of a copy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.bench import flops
from seqloom.bench.timing import First, Timing, attempt, first, interleave, rates
from seqloom.core import BadInput, BuildContext, Info
from seqloom.core.marks import cast
from seqloom.models.presets import HEAD_DIM, mixer_for
from seqloom.study.fit import count_parameters

Row = dict[str, Any]
BASE = "SDPA softmax"


class Attention(nn.Module):
    """Causal softmax attention without positions, nothing but two linear maps and PyTorch's own kernel: the yardstick."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


# our key: the name of flash-linear-attention's layer
FLA = {
    "gated_linear": "GatedLinearAttention", "delta": "DeltaNet", "gated_delta": "GatedDeltaNet", "hgrn": "HGRNAttention",
    "retention": "MultiScaleRetention", "mamba2": "Mamba2", "gated_slot": "GatedSlotAttention",
}


def _fla(name: str, dim: int, heads: int) -> tuple[nn.Module, Callable]:
    import fla.layers

    cls = getattr(fla.layers, FLA[name])
    layer = cls(hidden_size=dim, **({} if name in ("hgrn", "mamba2") else {"num_heads": heads}))
    return layer, lambda x: layer(x)[0]


def _ours(name: str, dim: int) -> tuple[nn.Module, Callable]:
    layer = mixer_for(name, dim).build(BuildContext(dim=dim))
    return layer, lambda x: layer(x).y


def _floor(name: str, layer: nn.Module, batch: int, tokens: int, dim: int, device: str, dtype: torch.dtype) -> float | None:
    """Seconds; None where the layer's operations are not counted."""
    weights = sum(p.numel() for p in layer.parameters())
    matrices = sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
    try:
        own = 4.0 * dim * flops.keys_seen(tokens, True, None) if name == BASE else flops.of_layer(layer, tokens)
    except BadInput:
        return None
    top, size = rates(device, dtype), torch.empty(0, dtype=dtype).element_size()
    operations = 3 * (2 * matrices + own) * batch * tokens
    return max(operations / top["operations"], size * (4 * batch * tokens * dim + 3 * weights) / top["bytes"])


def layers(mixers: list[str], *, rounds: int = 5, dim: int = 256, tokens: int = 4096, batch: int = 1, device: str = "cpu",
           dtype: torch.dtype | None = None) -> list[Row]:
    """Forward and backward of one layer of each mixer, and of flash-linear-attention's where it is installed on a GPU.

    `speedup` is over the layer called "SDPA softmax", in the same run; `times_floor` over the floor.
    """
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    heads = max(dim // HEAD_DIM, 1)
    makers: dict[str, Callable[[], tuple[nn.Module, Callable]]] = {BASE: partial(_sdpa, dim, heads)}
    makers |= {name: partial(_ours, name, dim) for name in mixers}
    if torch.device(device).type == "cuda" and importlib.util.find_spec("fla") is not None:
        makers |= {f"fla {FLA[name]}": partial(_fla, name, dim, heads) for name in mixers if name in FLA}
    calls: dict[str, Callable[[], None]] = {}
    began: dict[str, tuple[First, nn.Module]] = {}
    rows: list[Row] = []

    def ready(name: str) -> Row:
        torch.manual_seed(0)
        layer, run = makers[name]()
        cast(layer.to(device), dtype)
        x = torch.randn(batch, tokens, dim, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn_like(x)

        def both() -> None:
            layer.zero_grad(set_to_none=True)
            run(x).backward(dy)

        began[name] = (first(both), layer)
        calls[name] = both
        return {}

    for name in makers:
        row = attempt(name, partial(ready, name))
        if row:
            rows.append(row)
    timings = interleave(calls, rounds=rounds)
    base = timings[BASE].median
    for name, timing in timings.items():
        start, layer = began[name]
        floor = _floor(name, layer, batch, tokens, dim, device, dtype)
        rows.append({
            "name": name, "batch": batch, "tokens": tokens, "dim": dim, "tokens_per_second": batch * tokens / timing.median,
            "seconds": timing.median, "seconds_range": [timing.least, timing.most], "speedup": base / timing.median,
            "floor_seconds": floor, "times_floor": None if floor is None else timing.median / floor,
            "peak_gib": start.peak_gib, "setup_seconds": start.seconds, "parameters": count_parameters(layer),
        })
    order = list(makers)
    return sorted(rows, key=lambda row: order.index(row["name"]))


def _sdpa(dim: int, heads: int) -> tuple[nn.Module, Callable]:
    layer = Attention(dim, heads)
    return layer, layer


def segments(mixers: list[str], *, rounds: int = 3, tokens: int = 4096, count: int = 64, dim: int = 256, batch: int = 1,
             device: str = "cpu", dtype: torch.dtype | None = None) -> list[Row]:
    """One layer with `count` segments a row beside none: `cost` is the ratio."""
    return [attempt(name, partial(_packed, name, rounds, tokens, count, dim, batch, device, dtype)) for name in mixers]


def _packed(name: str, rounds: int, tokens: int, count: int, dim: int, batch: int, device: str,
            dtype: torch.dtype | None) -> Row:
    torch.manual_seed(0)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    layer = cast(mixer_for(name, dim).build(BuildContext(dim=dim)).to(device), dtype)
    x = torch.randn(batch, tokens, dim, device=device, dtype=dtype, requires_grad=True)
    count = min(count, tokens)
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: count - 1] + 1
    ids = torch.zeros(batch, tokens, dtype=torch.int64).index_fill_(1, cuts, 1).cumsum(1).to(device) + 1

    def run(info: Info) -> None:
        layer.zero_grad(set_to_none=True)
        layer(x, info=info).y.sum().backward()

    timings: dict[str, Timing] = interleave(
        {"none": lambda: run(Info()), "packed": lambda: run(Info(segments=ids))}, rounds=rounds
    )
    return {
        "name": name,
        "tokens": tokens,
        "segments": count,
        "seconds": timings["packed"].median,
        "seconds_without": timings["none"].median,
        "cost": timings["packed"].median / timings["none"].median,
    }

"""Kernels on a GPU beside attention by PyTorch's SDPA backends: forward, forward and backward, memory, and the floor.

The floor of a row is the larger of two times: the bytes it must move (each stream read once, each result and gradient
written once) over the measured copy bandwidth, and its multiplications over the measured rate of a bfloat16 product.
A form is timed only after it has been compared with the definition's float64 values on the same device.

flash-linear-attention's kernels are rows of their own where it is installed; its tuning takes minutes a kernel on a cold
machine, which `setup_seconds` shows. What fails, ours or another's, is a row that says why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.core import BadInput, near
from seqloom.kernels import decay_scan, delta_scan, diagonal_scan, row_norm, selective_scan, short_conv, softmax

HEADS, DIM, TOKENS = 16, 128, 32768  # of a batch, whatever its length
LENGTHS = (2048, 8192, 32768)
TRUST = 0.02  # relative error at which a form is not timed: bfloat16 leaves 0.002 to 0.005
Streams = tuple[Tensor, ...]


class Kernel(NamedTuple):
    """What to time. `elements` of bfloat16 that each token must move forward and backward, `operations` per token."""

    run: Callable[..., Tensor]
    make: Callable[[int, int], Streams]
    plain: Callable[..., Tensor]
    elements: Callable[[int], tuple[int, int]]
    operations: Callable[[int], tuple[int, int]]
    against: str = ""  # another library's kernel of the same computation


@contextlib.contextmanager
def head_size(dim: int) -> Iterator[None]:
    """Streams made inside have heads of `dim`, as many as the width of 2,048 holds."""
    global HEADS, DIM
    before = HEADS, DIM
    HEADS, DIM = WIDTH // dim, dim
    try:
        yield
    finally:
        HEADS, DIM = before


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _heads(batch: int, tokens: int) -> Streams:
    q, k, v = (_normal(batch, tokens, HEADS, DIM) for _ in range(3))
    return q * DIM**-0.5, k * DIM**-0.5, v


def _gated(shape: Callable[[int, int], tuple[int, ...]]) -> Callable[[int, int], Streams]:
    def make(batch: int, tokens: int) -> Streams:
        log_a = F.logsigmoid(torch.randn(*shape(batch, tokens), device="cuda")) / 16
        return *_heads(batch, tokens), log_a.to(torch.bfloat16) if log_a.ndim == 4 else log_a

    return make


def _delta(batch: int, tokens: int) -> Streams:
    q, k, v = _heads(batch, tokens)
    return q, F.normalize(k.float(), dim=-1).bfloat16(), v, torch.rand(batch, tokens, HEADS, device="cuda").bfloat16()


def _gated_delta(batch: int, tokens: int) -> Streams:
    log_a = F.logsigmoid(torch.randn(batch, tokens, HEADS, device="cuda")) / 16
    return *_delta(batch, tokens), log_a


def _diagonal(batch: int, tokens: int) -> Streams:
    a = torch.rand(batch, tokens, HEADS * DIM, device="cuda").mul_(0.2).add_(0.8)
    return a.bfloat16(), _normal(batch, tokens, HEADS * DIM)


def _selective(batch: int, tokens: int) -> Streams:
    """Streams, A and D as a Mamba layer has them: steps in float32, log-uniform in [0.001, 0.1], and A = -1 .. -N."""
    dt = torch.empty(batch, tokens, WIDTH, device="cuda").uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    A = -torch.arange(1.0, STATES + 1, device="cuda").repeat(WIDTH, 1)
    B, C = (_normal(batch, tokens, STATES) for _ in range(2))
    return _normal(batch, tokens, WIDTH), dt, B, C, A, torch.ones(WIDTH, device="cuda")


def _scanned(form: Callable) -> Callable[..., Tensor]:
    return lambda x, dt, B, C, A, D: form(x, dt, B, C, A=A, D=D).y


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _backend(name: str) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([getattr(SDPBackend, name)]):
            return _attention(q, k, v)

    return run


def _y(form: Callable) -> Callable[..., Tensor]:
    return lambda *streams: form(*streams).y


WIDTH, STATES = HEADS * DIM, 16
# operations of a bfloat16 product in the time of one exponential: a multiprocessor does 4,096 or 16 a clock, and of the former
# 0.8 is what is measured
EXPONENTIAL = 200
_quadratic = lambda tokens: (2 * tokens * WIDTH, 7 * tokens * WIDTH)                    # noqa: E731
_linear = lambda tokens: (4 * DIM * WIDTH, 12 * DIM * WIDTH)                            # noqa: E731
_matrix = lambda extra: lambda tokens: (4 * WIDTH + extra, 11 * WIDTH + 3 * extra)      # noqa: E731

KERNELS: dict[str, Kernel] = {
    "SDPA cuDNN": Kernel(_backend("CUDNN_ATTENTION"), _heads, _attention, _matrix(0), _quadratic),
    "SDPA flash": Kernel(_backend("FLASH_ATTENTION"), _heads, _attention, _matrix(0), _quadratic),
    "SDPA efficient": Kernel(_backend("EFFICIENT_ATTENTION"), _heads, _attention, _matrix(0), _quadratic),
    "softmax": Kernel(_y(partial(softmax.fused, pattern=softmax.Pattern())), _heads, _attention, _matrix(0), _quadratic,
                      "SDPA cuDNN"),
    "diagonal": Kernel(_y(diagonal_scan.fused), _diagonal, _y(diagonal_scan.chunked),
                       lambda t: (3 * WIDTH, 8 * WIDTH), lambda t: (2 * WIDTH, 6 * WIDTH), "fla chunk_hgrn"),
    "linear": Kernel(_y(decay_scan.fused), _heads, _y(decay_scan.chunked), _matrix(0), _linear),
    "scalar decay": Kernel(_y(decay_scan.fused), _gated(lambda b, t: (b, t, HEADS)), _y(decay_scan.chunked),
                           _matrix(2 * HEADS), _linear),
    "vector decay": Kernel(_y(decay_scan.fused), _gated(lambda b, t: (b, t, HEADS, DIM)), _y(decay_scan.chunked),
                           _matrix(WIDTH), _linear, "fla chunk_gla"),
    "value decay": Kernel(_y(partial(decay_scan.fused, axis="value")), _gated(lambda b, t: (b, t, HEADS, DIM)),
                          _y(partial(decay_scan.chunked, axis="value")), _matrix(WIDTH), _linear),
    # an exponential for each state, forward and again backward
    "selective": Kernel(_scanned(selective_scan.fused), _selective, _scanned(selective_scan.chunked),
                        lambda t: (4 * WIDTH + 2 * STATES, 11 * WIDTH + 6 * STATES),
                        lambda t: (EXPONENTIAL * WIDTH * STATES, 2 * EXPONENTIAL * WIDTH * STATES)),
    "delta": Kernel(_y(delta_scan.fused), _delta, _y(delta_scan.chunked), _matrix(HEADS), _linear, "fla chunk_delta_rule"),
    "gated delta": Kernel(_y(delta_scan.fused), _gated_delta, _y(delta_scan.chunked), _matrix(3 * HEADS), _linear),
}

# neighbours of the scans: (forward, forward and backward) elements and operations per token do not depend on the length
_convolve = lambda form: lambda x, weight: form(x, weight=weight, activation="silu").y  # noqa: E731
_normed = lambda form: lambda x, gate, weight: form(x, weight, gate, eps=1e-6)           # noqa: E731
_unit = lambda form: lambda x: form(x, eps=1e-6)                                         # noqa: E731
KERNELS |= {
    "short conv": Kernel(_convolve(short_conv.fused), lambda b, t: (_normal(b, t, WIDTH), _normal(WIDTH, 4)),
                         _convolve(short_conv.parallel), lambda t: (2 * WIDTH, 5 * WIDTH), lambda t: (8 * WIDTH, 32 * WIDTH)),
    "gated norm": Kernel(_normed(row_norm.fused_rms_norm), lambda b, t: (*_heads(b, t)[1:], _normal(DIM)),
                         _normed(row_norm.rms_norm), lambda t: (3 * WIDTH, 8 * WIDTH), lambda t: (8 * WIDTH, 32 * WIDTH)),
    "L2 norm": Kernel(_unit(row_norm.fused_l2_norm), lambda b, t: _heads(b, t)[2:], _unit(row_norm.l2_norm),
                      lambda t: (2 * WIDTH, 5 * WIDTH), lambda t: (3 * WIDTH, 12 * WIDTH)),
}


def peers() -> dict[str, Kernel]:
    """flash-linear-attention's kernels of the same computations; none where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return {}
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.hgrn import chunk_hgrn

    gla, delta = KERNELS["vector decay"], KERNELS["delta"]
    plain, matrix = KERNELS["diagonal"].plain, KERNELS["diagonal"]

    def log_diagonal(batch: int, tokens: int) -> Streams:
        a, b = _diagonal(batch, tokens)
        return a.float().log(), b

    return {
        "fla chunk_gla": gla._replace(run=lambda q, k, v, g: chunk_gla(q, k, v, g, scale=1.0)[0], against=""),
        "fla chunk_delta_rule": delta._replace(run=lambda q, k, v, b: chunk_delta_rule(q, k, v, b, scale=1.0)[0], against=""),
        "fla chunk_hgrn": matrix._replace(run=lambda g, x: chunk_hgrn(x, g)[0], make=log_diagonal,
                                          plain=lambda g, x: plain(g.exp(), x), against=""),
    }


def milliseconds(call: Callable[[], Any], rounds: int = 12) -> float:
    """Median of `rounds` replays of a graph of the call between device events: what the card does, without launch gaps."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def ceilings() -> Mapping[str, float]:
    """Bytes a second of a copy, counting both ways, and operations a second of a bfloat16 product."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    a, b = (_normal(8192, 8192) for _ in range(2))
    return {"bytes": copy, "operations": 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3}


def error(kernel: Kernel, tokens: int = 1000) -> tuple[float, float]:
    """Worst error over outputs and gradients as a multiple of plain PyTorch's in the same precision, and the worst itself.

    Root mean square against float64; plain PyTorch is the chunked form of the same streams, float32 inside, its results
    rounded to bfloat16. Results start poisoned.
    """
    torch.manual_seed(0)
    streams = kernel.make(2, tokens)
    seen = {}
    for name, form, cast in (("got", kernel.run, False), ("plain", kernel.plain, False), ("want", kernel.plain, True)):
        given = [(x.double() if cast else x.clone()).requires_grad_() for x in streams]
        poison = torch.full((2**26,), float("nan"), device="cuda")
        del poison  # the allocator hands these pages to whoever asks next
        y = form(*given)
        weights = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16().to(y.dtype)
        seen[name] = [y.detach(), *torch.autograd.grad(y, given, weights)]
    rms = lambda got, want: float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())  # noqa: E731
    pairs = [(rms(g, w), rms(p.bfloat16(), w)) for g, p, w in zip(seen["got"], seen["plain"], seen["want"], strict=True)]
    return max(g / p if g == g else float("inf") for g, p in pairs), max(g for g, _ in pairs)


def kernels(names: list[str] | None = None, *, lengths: tuple[int, ...] = LENGTHS, dim: int | None = None,
            backward: bool = True) -> list[dict[str, Any]]:
    """One row per kernel and length, and `times_peer`: another library's time over ours, where it has the same kernel. `dim`:
    channels of a head (128); the width stays.

    Rows of a kernel that fails its comparison say so and have no times; a kernel that fails to run says why.
    """
    if not torch.cuda.is_available():
        raise BadInput("the kernels suite times a GPU, and there is none here; the other suites run on a CPU")
    known = KERNELS | peers()
    for name in names or ():
        if name not in known:
            raise BadInput(f"no kernel {name!r}; {near(name, known)}")
    top, rows = ceilings(), []
    for name in names or list(known):
        try:
            with head_size(dim or DIM):
                rows += _rows(name, known[name], lengths, backward, top)
        except Exception as error:  # another library's kernel, or ours on a card it was not made for
            said = str(error).strip().splitlines()
            rows.append({"kernel": name, "failed": f"failed: {type(error).__name__}: {said[0][:120] if said else ''}"})
        torch.cuda.empty_cache()
    for row in rows:
        peer = next((other for other in rows if other["kernel"] == known[row["kernel"]].against
                     and other.get("tokens") == row.get("tokens") and "both_ms" in other), None)
        if peer is not None and "both_ms" in row:
            row["times_peer"] = peer["both_ms"] / row["both_ms"]
    return rows


def _rows(name: str, kernel: Kernel, lengths: tuple[int, ...], backward: bool,
          top: Mapping[str, float]) -> list[dict[str, Any]]:
    rows = []
    began = time.perf_counter()
    ratio, worst = error(kernel)
    setup = time.perf_counter() - began
    for tokens in lengths:
        row: dict[str, Any] = {"kernel": name, "tokens": tokens, "batch": TOKENS // tokens, "error": worst,
                               "error_ratio": ratio, "setup_seconds": round(setup, 1)}
        rows.append(row)
        if not worst < TRUST:
            row["red"] = "differs from float64: not timed"
            continue
        streams = [x.requires_grad_() for x in kernel.make(TOKENS // tokens, tokens)]
        elements, operations = kernel.elements(tokens), kernel.operations(tokens)
        floor = [1e3 * max(2 * e * TOKENS / top["bytes"], o * TOKENS / top["operations"])
                 for e, o in zip(elements, operations, strict=True)]
        with torch.no_grad():
            row["forward_ms"] = milliseconds(lambda: kernel.run(*streams))  # noqa: B023
        row["forward_floor_ms"] = floor[0]
        if backward:
            weights = torch.randn_like(kernel.run(*streams))

            def both(streams: list = streams, weights: Tensor = weights) -> None:
                torch.autograd.grad(kernel.run(*streams), streams, weights)

            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            both()
            row["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / 2**30
            row["both_ms"] = milliseconds(both)
            row["both_floor_ms"] = floor[1]
            row["times_floor"] = row["both_ms"] / floor[1]
        torch.cuda.empty_cache()
    return rows

"""What a block costs: seconds and bytes of a training step and of decoding a token, by mixer, batch, length and width.

    python -m seqloom.bench.costs --device cpu --out benchmarks/costs

One block (mixer, SwiGLU, two norms) at the mixer's defaults for the width, float32 on a CPU and bfloat16 autocast on a GPU.
These rows are what `study/advise.py` fits. On a CPU seconds are of processor time on one thread, which other processes on the
machine hardly move; on a GPU they are wall time between two waits. Bytes are the most that was allocated at once besides
the block, its gradients included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seqloom.bench import report
from seqloom.core import keep_pages
from seqloom.study.arms import arm, causal_mixers
from seqloom.study.fit import count_parameters

Row = dict[str, Any]


class Shape(NamedTuple):
    batch: int
    tokens: int
    dim: int


SHAPES = {
    "cpu": (Shape(1, 128, 64), Shape(1, 1024, 64), Shape(4, 256, 128), Shape(1, 256, 256), Shape(1, 1024, 256),
            Shape(1, 3072, 64)),
    "cuda": (Shape(8, 1024, 512), Shape(8, 2048, 1024), Shape(4, 4096, 512), Shape(2, 8192, 1024), Shape(1, 32768, 512),
             Shape(2, 2048, 2048), Shape(1, 8192, 2048)),
}
# width, and tokens read before
CONTEXTS = {"cpu": ((256, 512), (256, 4096), (512, 512)), "cuda": ((1024, 2048), (1024, 16384), (2048, 2048))}


def training_row(name: str, shape: Shape, device: str, rounds: int) -> Row:
    """Forward and backward of one block: the median of `rounds` after one that warms up, and the peak of one more."""
    torch.manual_seed(0)
    block = arm(name, dim=shape.dim, layers=1).build().to(device)
    x = torch.randn(*shape, device=device, requires_grad=True)

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y = block(x).y
        y.float().square().mean().backward()

    step()
    seconds = [timed(step, device) for _ in range(rounds)]
    return {"mixer": name, "what": "train", **shape._asdict(), "seconds": statistics.median(seconds),
            "peak_bytes": peak_bytes(step, device, block), "parameters": count_parameters(block)}


@torch.inference_mode()
def decoding_row(name: str, dim: int, context: int, device: str, rounds: int, steps: int = 8) -> Row:
    """One token through one block whose state has read `context` tokens."""
    torch.manual_seed(0)
    block = arm(name, dim=dim, layers=1).build().to(device).eval()
    state = block.init_state(1, capacity=context + (rounds + 1) * steps, device=device)
    part = 1024
    for start in range(0, context, part):
        state = block(torch.randn(1, min(part, context - start), dim, device=device), state=state).state
    token, box = torch.randn(1, 1, dim, device=device), [state]

    def run() -> None:
        for _ in range(steps):
            box[0] = block(token, state=box[0], donate=True).state

    run()
    seconds = statistics.median(timed(run, device) for _ in range(rounds)) / steps
    return {"mixer": name, "what": "decode", "batch": 1, "tokens": context, "dim": dim, "seconds": seconds}


def timed(call: Callable[[], None], device: str) -> float:
    """Seconds of one call: processor time on a CPU, wall time between two waits on a GPU."""
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], None], device: str, block: torch.nn.Module) -> int:
    """The most bytes that one call holds at once, beyond what it found; it finds no gradients."""
    block.zero_grad(set_to_none=True)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def costs(mixers: Sequence[str] = (), *, device: str = "cpu", rounds: int = 3, deadline: float | None = None,
          shapes: Sequence[Shape] | None = None, contexts: Sequence[tuple[int, int]] | None = None,
          say: Callable[[str], None] = lambda text: None, keep: Callable[[list[Row]], object] = lambda rows: None) -> list[Row]:
    """Rows of all `mixers` (the causal ones by default); what does not run is a row with "error".

    After `deadline` (seconds from now) nothing more is begun. `keep` is given the rows so far, mixer by mixer.
    """
    rows: list[Row] = []
    began = time.perf_counter()

    def measure(call: Callable[[], Row], facts: Row) -> None:
        if deadline is not None and time.perf_counter() - began > deadline:
            return
        try:
            row = call()
        except Exception as error:  # out of memory, of shared memory, of what a kernel takes: the others are still measured
            row = {**facts, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        rows.append(row)
        say(f"{time.perf_counter() - began:6.0f} s  " + "  ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

    for name in mixers or causal_mixers():
        for shape in SHAPES[device] if shapes is None else shapes:
            facts = {"mixer": name, "what": "train", **shape._asdict()}
            measure(lambda name=name, shape=shape: training_row(name, shape, device, rounds), facts)
        for dim, context in CONTEXTS[device] if contexts is None else contexts:
            facts = {"mixer": name, "what": "decode", "batch": 1, "tokens": context, "dim": dim}
            measure(lambda name=name, dim=dim, context=context: decoding_row(name, dim, context, device, rounds), facts)
        keep(rows)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixers", default="", help="with commas between; all causal ones by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deadline", type=float, help="seconds after which nothing more is begun")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.device == "cpu":
        torch.set_num_threads(1)
        keep_pages()

    def keep(rows: list[Row]) -> Path:
        return report.write("costs", rows, options.out, gpu=options.device == "cuda")

    names = [name for name in options.mixers.split(",") if name]
    found = costs(names, device=options.device, rounds=options.rounds, deadline=options.deadline,
                  say=lambda text: print(text, flush=True), keep=keep)
    print(f"wrote {keep(found)}")


if __name__ == "__main__":
    main()

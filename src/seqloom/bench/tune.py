"""Tiles for the user's own card: `seqloom bench --tune`.

Every pass of a kernel's configuration is changed one number at a time, and what makes forward and backward faster is kept. A
change whose results differ from those of the configuration before it is not timed; one that does not compile, or needs more
than the card has, is passed over.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch

from seqloom.bench import kernels as K
from seqloom.core import BadInput

# kernel file -> key of its CONFIGS -> (name in KERNELS, head size, tokens a row): what is timed for that key
CASES: dict[str, dict[Any, tuple[str, int, int]]] = {
    "decay_scan": {0: ("linear", 128, 2048), 1: ("scalar decay", 128, 2048), 2: ("vector decay", 128, 2048)},
    "delta_scan": {(64, 2): ("delta", 64, 2048), (128, 2): ("delta", 128, 2048), (256, 2): ("delta", 256, 2048)},
}
CHOICES = {"warps": (2, 4, 8), "stages": (1, 2, 3, 4)}
LEAST, MOST = 16, 256     # of a block
GAIN = 0.99               # of the time so far, at which a change is worth keeping
TRUST = 1e-2              # relative difference of results: what another order of sums leaves in bfloat16


def changes(tile: Any, field: str) -> Iterator[Any]:
    """Configurations of one pass that differ in `field`. A block of 0 is one that the kernel chooses."""
    value = getattr(tile, field)
    for other in CHOICES.get(field, (value // 2, value * 2)):
        if other != value and value and (field in CHOICES or LEAST <= other <= MOST):
            yield tile._replace(**{field: other})


def search(table: MutableMapping, key: Any, measure: Callable[[], tuple[float, Any]], deadline: float,
           told: Callable[[str], None] = lambda line: None) -> tuple[float, float]:
    """Improve table[key] in place; (milliseconds before, after). `measure() -> (milliseconds, results)` uses what is there.

    Raises: BadInput if what is there does not run.
    """
    try:
        first, want = measure()
    except Exception as error:
        raise BadInput(f"the tiles in force for {key} do not run here: {str(error).splitlines()[0]}") from error
    best = first
    places = [(each, field) for each in table[key]._fields for field in getattr(table[key], each)._fields]
    for name, field in places:
        for tile in list(changes(getattr(table[key], name), field)):
            if time.perf_counter() > deadline:
                told("out of time: what was found so far is kept")
                return first, best
            before = table[key]
            table[key] = before._replace(**{name: tile})
            try:
                found, got = measure()
                keep = found < GAIN * best and alike(got, want)
            except Exception as error:  # the compiler, the launch or the card refuses in many ways
                told(f"{name} {tuple(tile)}: {type(error).__name__}")
                keep = False
            if keep:
                best = found
                told(f"{name} {tuple(tile)}: {found:.3f} ms")
            else:
                table[key] = before
    return first, best


def alike(got: Any, want: Any) -> bool:
    """Whether two tuples of tensors agree to TRUST in the mean square; NaN does not."""
    near = lambda a, b: (a.float() - b.float()).norm() <= TRUST * b.float().norm() + 1e-12  # noqa: E731
    return all(bool(near(a, b)) for a, b in zip(got, want, strict=True))


def _measure(case: tuple[str, int, int]) -> Callable[[], tuple[float, Any]]:
    name, dim, tokens = case
    kernel = K.KERNELS[name]
    torch.manual_seed(0)
    with K.head_size(dim):
        streams = [x.requires_grad_() for x in kernel.make(K.TOKENS // tokens, tokens)]
    weights = torch.randn_like(kernel.run(*streams))

    def both() -> tuple:
        y = kernel.run(*streams)
        return (y.detach(), *torch.autograd.grad(y, streams, weights))

    return lambda: (K.milliseconds(both), both())


def tune(names: list[str] | None = None, *, seconds: float = 600.0,
         told: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Search the tiles of each kernel file (None: all that have some) and store them for this card. One row a key.

    Raises: BadInput without a CUDA device, or for an unknown kernel file.
    """
    if not torch.cuda.is_available():
        raise BadInput("--tune times a GPU, and there is none here")
    from seqloom.kernels.triton import tiles

    rows: list[dict[str, Any]] = []
    deadline = time.perf_counter() + seconds
    for kernel in names or list(CASES):
        if kernel not in CASES:
            raise BadInput(f"no tiles are tuned for {kernel!r}; known: {', '.join(CASES)}")
        table = importlib.import_module(f"seqloom.kernels.triton.{kernel}").CONFIGS
        for key, case in CASES[kernel].items():
            row: dict[str, Any] = {"kernel": kernel, "key": str(key), "case": f"{case[0]}, heads of {case[1]}"}
            rows.append(row)
            began = time.perf_counter()
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                row["before_ms"], row["after_ms"] = search(table, key, _measure(case), deadline, told)
                row["times"] = row["before_ms"] / row["after_ms"]
            row["seconds"] = round(time.perf_counter() - began, 1)
        path = tiles.write(torch.cuda.get_device_name(), kernel, table)
        told(f"wrote {path}")
    return rows

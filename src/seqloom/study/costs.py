"""Cost models: seconds and bytes of a block by batch B, tokens T and width D, fitted to measured rows by least squares.

    training, seconds   c0 + c1 T + c2 B T D + c3 B T D^2 [+ c4 B T^2 D]
    training, bytes     c0 B T D + c1 B T + c2 D^2        the peak of a step besides the weights, gradients included
    decoding, seconds   c0 + c1 D + c2 D^2 [+ c3 T D]

All coefficients are at least 0, errors count relative to the measured value, and the terms in brackets belong to mixers whose
state grows with the sequence. Rows come from `bench/costs.py` (one block) and, scaled by one number a file because they were
measured on other threads, from whole models in benchmarks/results.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqloom.models.presets import mixer_for

# Whole models among the committed results: file, what it times, and how many blocks.
SUITES = {"training_cpu": ("train", 4), "lengths_cpu": ("train", 2), "decoding_cpu": ("decode", 4)}

Row = Mapping[str, Any]


def features(what: str, row: Row, grows: bool) -> list[float]:
    """What the coefficients multiply. `what`: "train", "bytes" or "decode"."""
    B, T, D = float(row["batch"]), float(row["tokens"]), float(row["dim"])
    if what == "bytes":
        return [B * T * D, B * T, D * D]
    if what == "decode":
        return [1.0, D, D * D] + ([T * D] if grows else [])
    return [1.0, T, B * T * D, B * T * D * D] + ([B * T * T * D] if grows else [])


def least_squares(x: Sequence[Sequence[float]], y: Sequence[float]) -> list[float]:
    """Coefficients >= 0 that make the sum of ((x c - y) / y)^2 least: the best over all subsets of at most 5 columns.

    A column more has to pay for itself: 1e-4 of squared relative error a row. Raises: ValueError without rows.
    """
    if not len(y):
        raise ValueError("a cost model needs at least one measured row")
    A = np.asarray(x, dtype=float) / np.asarray(y, dtype=float)[:, None]
    size = np.abs(A).max(0)
    size[size == 0] = 1.0
    best, found = math.inf, np.zeros(A.shape[1])
    for count in range(1, min(A.shape) + 1):
        for chosen in itertools.combinations(range(A.shape[1]), count):
            c = np.linalg.lstsq(A[:, chosen] / size[list(chosen)], np.ones(len(A)), rcond=None)[0]
            error = float(((A[:, chosen] / size[list(chosen)] @ c - 1) ** 2).sum()) + 1e-4 * count * len(A)
            if (c >= 0).all() and error < best:
                best, found = error, np.zeros(A.shape[1])
                found[list(chosen)] = c / size[list(chosen)]
    return [float(value) for value in found]


def predict(coefficients: Sequence[float], what: str, row: Row, grows: bool) -> float:
    return sum(c * f for c, f in zip(coefficients, features(what, row, grows), strict=True))


def fit_device(rows: Sequence[Row], extra: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Models of every mixer in `rows`. `extra`: rows of whole models by file, as `read_results` gives them.

    Each file gets one scale, the median ratio of its rows to what one-block rows predict; divided by it they join the fit.
    """
    rows = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    first = {name: _fit_mixer(name, [row for row in rows if row["mixer"] == name]) for name in names}
    scales, more = {}, []
    for file, found in extra.items():
        known = [row for row in found if row["what"] in first.get(row["mixer"], {})]
        if not known:
            continue
        ratios = [row["seconds"] / predict(first[row["mixer"]][row["what"]], row["what"], row, first[row["mixer"]]["grows"])
                  for row in known]
        scales[file] = statistics.median(ratios)
        more += [{**row, "seconds": row["seconds"] / scales[file]} for row in known]
    models = {name: _fit_mixer(name, [row for row in [*rows, *more] if row["mixer"] == name]) for name in names}
    trained = [row for row in [*rows, *more] if row["what"] == "train"]
    span = lambda key: [min(row[key] for row in trained), max(row[key] for row in trained)]  # noqa: E731
    return {"scales": scales, "rows": len(rows) + len(more),
            "ranges": {"tokens": span("tokens"), "dim": span("dim"), "batch": span("batch")}, "mixers": models}


def _fit_mixer(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    grows = not mixer_for(name, 64).constant_state
    model: dict[str, Any] = {"grows": grows}
    errors = {}
    for what, key in (("train", "seconds"), ("bytes", "peak_bytes"), ("decode", "seconds")):
        some = [row for row in rows if row["what"] == ("decode" if what == "decode" else "train") and row.get(key)]
        if some:
            model[what] = least_squares([features(what, row, grows) for row in some], [row[key] for row in some])
            errors[what] = statistics.median(abs(predict(model[what], what, row, grows) / row[key] - 1) for row in some)
    return {**model, "error": errors}


def read_results(folder: Path) -> dict[str, list[Row]]:
    """Rows of committed whole-model benchmarks, seconds per block, by file."""
    found: dict[str, list[Row]] = {}
    for file, (what, layers) in SUITES.items():
        path = folder / f"{file}.json"
        if path.exists():
            rows: list[Row] = []
            for row in json.loads(path.read_text())["rows"]:
                seconds = row["seconds"] if what == "train" else 1 / row["tokens_per_second"]
                rows.append({"mixer": row["name"], "what": what, "batch": row.get("batch", 1), "dim": 256,
                             "tokens": row["tokens"] if what == "train" else row["context"], "seconds": seconds / layers})
            found[file] = rows
    return found


def collect(benchmarks: Path) -> dict[str, Any]:
    """Models by device from benchmarks/costs/costs_<device>.json and benchmarks/results."""
    devices = {}
    for path in sorted((benchmarks / "costs").glob("costs_*.json")):
        record, device = json.loads(path.read_text()), path.stem.removeprefix("costs_")
        results = {file: rows for file, rows in read_results(benchmarks / "results").items() if file.endswith(f"_{device}")}
        where = record["machine"]
        devices[device] = {
            "machine": where["gpu"] or f"{where['processor']}, one thread", "torch": where["torch"],
            "commit": record["commit"], "date": record["date"],
            "sources": [f"costs/{path.name}", *(f"results/{file}.json" for file in results)],
            **fit_device(record["rows"], results),
        }
    return devices

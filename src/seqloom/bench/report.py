"""Benchmark rows as a table on the terminal and as JSON with machine, versions and commit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from seqloom.study.digest import commit, machine, metadata_version

PEERS = ("transformers", "x-transformers", "flash-linear-attention", "triton", "numpy")


def table(rows: list[dict[str, Any]]) -> str:
    """Plain columns in the order in which rows bring them, without those that are empty; nested values are left to the JSON."""
    if not rows:
        return "no rows"
    found = dict.fromkeys(key for row in sorted(rows, key=lambda row: "failed" in row) for key in row)
    keys = [key for key in found if any(row.get(key) is not None for row in rows)
            and not any(isinstance(row.get(key), (list, dict)) for row in rows)]
    cells = [[_shown(row.get(key)) for key in keys] for row in rows]
    widths = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(keys)]
    lines = ["  ".join(key.ljust(width) for key, width in zip(keys, widths, strict=True))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else ("yes" if value else "no")
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(suite: str, rows: list[dict[str, Any]], folder: Path, *, gpu: bool = False) -> Path:
    """<suite>_<device>.json, the device `cpu` or a word of the card's name with a digit in it, such as h100."""
    folder.mkdir(parents=True, exist_ok=True)
    words = torch.cuda.get_device_name().lower().split() if gpu else ["cpu"]
    device = next((word for word in words if any(c.isdigit() for c in word)), words[-1])
    path = folder / f"{suite.replace('-', '_')}_{device}.json"
    record = {
        "suite": suite,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: metadata_version(name) for name in PEERS},
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path

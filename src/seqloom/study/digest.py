"""Is a committed result still about this code? A digest of what was run and of the modules that ran it."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import seqloom

ROOT = Path(seqloom.__file__).parent
# What may change without changing any number: parsing, printing, documentation.
OUTSIDE = ("cli", "bench", "hub", "study.digest", "study.evidence", "study.compare", "_version")
GPU_ONLY = ("kernels.triton", "kernels.cuda_attention")  # nor this, where a number is measured on a CPU


def influences(*roots: str, gpu: bool = False) -> list[str]:
    """The seqloom modules behind the names that `roots` use, and those behind these, and so on; what only a GPU runs only
    with `gpu`.

    A class or function counts for the module that defines it, whatever package handed it on: what else stands in a table
    of mixers does not matter to a recipe that names one of them.
    """
    found: set[str] = set()
    todo = list(roots)
    outside = OUTSIDE if gpu else OUTSIDE + GPU_ONLY
    while todo:
        name = todo.pop()
        if name in found or any(name.removeprefix("seqloom.").startswith(skip) for skip in outside):
            continue
        found.add(name)
        for value in vars(importlib.import_module(name)).values():
            other = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            # a package has its submodules as attributes, whoever imported them
            own = inspect.ismodule(value) and value.__name__.startswith(f"{name}.")
            if isinstance(other, str) and other.startswith("seqloom.") and not own:
                todo.append(other)
    return sorted(found)


def digest(what: Any, modules: list[str]) -> str:
    """Hex digest of plain data and of the source text of `modules`."""
    sha = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for name in modules:
        base = ROOT.joinpath(*name.split(".")[1:])
        path = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        sha.update(path.read_bytes() if path.exists() else b"gone")
    return sha.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Where a number was measured: processor, threads, device, versions."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seqloom": metadata_version("seqloom"),
    }


def metadata_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()

"""The import order of the folders, what importing costs, and that no optional package is needed for it."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = [
    "datasets", "pyarrow", "peft", "triton", "x_transformers", "psutil", "tensorboard", "trackio", "sklearn", "gymnasium",
    "torch_geometric", "gradio", "fla", "mamba_ssm", "causal_conv1d", "flash_attn", "lm_eval", "pandas", "scipy", "PIL",
    "numba",
]


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_folders_import_only_what_is_below_them():
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )
    assert found.returncode == 0 and "1 kept, 0 broken" in found.stdout, found.stdout + found.stderr


def seconds(code: str) -> float:
    began = time.perf_counter()
    found = python(code)
    assert found.returncode == 0, found.stderr
    return time.perf_counter() - began


@pytest.mark.parametrize("code", ["import seqloom", "from seqloom import MIXERS"])
def test_import_costs_little_more_than_torch(code):
    """Whole processes, interleaved; the least of each, since a busy machine only ever adds."""
    plain, ours = [], []
    for attempt in range(9):
        plain.append(seconds("import torch"))
        ours.append(seconds(f"import torch; {code}"))
        if attempt >= 2 and min(ours) <= 1.3 * min(plain):
            return
    pytest.fail(f"{code} takes {min(ours):.2f} s, {min(ours) / min(plain):.2f} times import torch")


def test_import_seqloom_alone_does_not_load_the_hub():
    heavy = {"transformers", "seqloom.hub", "matplotlib", "accelerate"}
    found = python(f"import seqloom, sys; print(sorted({heavy} & set(sys.modules)))")
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def modules() -> list[str]:
    """Every module of the package but the GPU kernels, which are imported when launched."""
    names = [found.name for found in pkgutil.walk_packages([str(ROOT / "src" / "seqloom")], "seqloom.")]
    return [name for name in names if not name.startswith("seqloom.kernels.triton.") and not name.endswith("__main__")]


def test_no_optional_package_is_needed_to_import():
    """With every optional package blocked, each module still imports. What is broken in itself is named."""
    code = f"""
import importlib, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
broken = []
for name in {modules()!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        broken.append(f"{{name}}: {{type(error).__name__}}: {{error}}")
print("\\n".join(broken))
"""
    found = python(code)
    assert found.returncode == 0 and not found.stdout.strip(), found.stdout + found.stderr


def test_annotations_can_be_checked_at_run_time():
    """Every module imports under jaxtyping's hook, so that `pytest --jaxtyping-packages=seqloom,beartype.beartype` runs."""
    code = f"""
import importlib, jaxtyping
with jaxtyping.install_import_hook("seqloom", "beartype.beartype"):
    for name in {modules()!r}:
        importlib.import_module(name)
"""
    found = python(code)
    assert found.returncode == 0, found.stderr[-1500:]

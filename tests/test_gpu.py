"""What only a CUDA device can show. `pytest -m gpu`; skipped, and said to be, where there is none."""

import pytest
import torch

from seqloom.bench.kernels import KERNELS, error, head_size

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]


@pytest.mark.parametrize("name", KERNELS)
def test_a_fused_kernel_errs_at_most_twice_as_much_as_plain_pytorch_in_bfloat16(name):
    times, worst = error(KERNELS[name])
    assert times <= 2 and worst < 0.01


@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 256])
@pytest.mark.parametrize("name", ["delta", "gated delta"])
def test_heads_of_any_size_come_out_right_in_bfloat16(name, dim):
    with head_size(dim):  # keys that are no multiple of 16 were wrong by their size, and walks of one stage at 80
        assert error(KERNELS[name], tokens=300)[1] < 0.02

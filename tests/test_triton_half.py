"""16-bit streams through the Triton kernels, by the interpreter: what a form's own roundings add to those of its input.

float16 stands in for bfloat16, which the interpreter cannot multiply: it rounds at the same places, three digits later, and
the ratio to plain PyTorch's error is what the law holds a card to.
"""

import pytest
import torch
from interpreted import report_of, run_checks

CASES = {"gated_slot": "", "delta_product": "three"}  # two scans in a row; three steps a token among six keys


def ratio(mixer: str) -> float:
    """Worst error of the fused form, outputs and gradients, in units of twice the definition's."""
    from seqloom.laws import precision
    from seqloom.laws.cases import Case, cases

    precision.LOW, Case.forms = torch.float16, lambda case, device: ["fused"]
    case = next(case for case in cases([mixer]) if case.example == CASES[mixer])
    found = list(precision.bf16_error(case, "cpu"))
    assert len(found) > 3
    return max(m.value / m.limit if m.limit else m.value for m in found)


@pytest.fixture(scope="module")
def report():
    return report_of(__file__)


@pytest.mark.parametrize("mixer", CASES)
def test_a_fused_form_errs_at_most_twice_as_much_as_its_definition(report, mixer):
    assert report[mixer] <= 1


if __name__ == "__main__":
    run_checks({mixer: lambda mixer=mixer: ratio(mixer) for mixer in CASES})

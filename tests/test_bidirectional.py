"""What mixers that look both ways share, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from seqloom.core import MissingExtra, Segments, is_exact
from seqloom.mixers import Hydra, LinearAttention, Lion, hydra, lion
from seqloom.parts.bidirectional import CentredConv, previous
from seqloom.tasks import DigitPatches
from seqloom.tasks.real import digits as digit_files


def segments(*rows):
    """Segments from rows of ids, 0 for a pad."""
    ids = torch.tensor(rows)
    before = torch.zeros(len(rows), dtype=torch.int64)
    runs = []
    for t in range(ids.shape[1]):
        reset = (ids[:, t] != 0) & (before != 0) & (ids[:, t] != before)
        before = torch.where(ids[:, t] != 0, ids[:, t], before)
        runs.append((runs[-1] if runs else torch.zeros_like(before)) + reset)
    return Segments(ids != 0, torch.stack(runs, 1))


def test_previous_stays_in_its_segment_and_skips_pads():
    x = torch.arange(1.0, 9.0)[None, :, None]
    assert previous(x).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    packed = segments([1, 1, 1, 2, 2, 2, 3, 3])
    assert previous(x, packed).flatten().tolist() == [0, 1, 2, 0, 4, 5, 0, 7]
    padded = segments([0, 1, 0, 1, 0, 2, 0, 2])
    assert previous(x, padded).flatten()[padded.real[0]].tolist() == [0, 2, 0, 6]


def test_previous_lets_no_nan_through():
    ids = segments([0, 1, 0, 1, 2, 0])
    x = torch.where(ids.real[..., None], torch.ones(1, 6, 2), float("nan")).requires_grad_()
    y = ids.hold(previous(x, ids))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_centred_convolution_is_the_library_s():
    torch.manual_seed(0)
    conv, x = CentredConv(6, 7).double(), torch.randn(2, 19, 6, dtype=torch.float64)
    want = F.conv1d(x.mT, conv.weight[:, None], conv.bias, padding=3, groups=6).mT
    torch.testing.assert_close(conv(x), F.silu(want))


def test_an_even_convolution_is_refused():
    with pytest.raises(ValueError, match="use conv=5"):
        Hydra(conv=4)
    with pytest.raises(ValueError, match="width=7"):
        CentredConv(8, 6)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="columns"):
        Lion(heads=2, order="serpentine")
    with pytest.raises(ValueError, match="order of tokens does not matter"):
        Lion(heads=2, mask="none", order="serpentine", columns=4)
    with pytest.raises(ValueError, match="norm_side='query'"):
        LinearAttention(heads=2, normaliser="count", norm_side="key", direction="bidirectional")


def test_serpentine_orders_of_a_small_image():
    rows, columns = lion.serpentine(torch.arange(6)[None], 3)
    assert rows.tolist() == [[0, 1, 2, 5, 4, 3]]
    assert columns.tolist() == [[0, 3, 4, 1, 2, 5]]


def test_serpentine_orders_stay_in_their_segment():
    ids = segments([1, 1, 1, 1, 0, 2, 2, 2, 2, 2])
    positions = torch.tensor([[0, 1, 2, 3, 3, 0, 1, 2, 3, 4]])
    for order in lion.serpentine(positions, 2, ids)[:, 0].tolist():
        assert sorted(order[:5]) == [0, 1, 2, 3, 4] and sorted(order[5:]) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("table", [hydra.FORMS, lion.FORMS])
def test_the_definition_is_a_matrix_and_other_forms_exist(table):
    assert next(iter(table)) == "matrix"
    assert sum(is_exact(form) for form in table.values()) == 3


def test_digits_without_scikit_learn(monkeypatch):
    def absent(module, extra, why):
        raise MissingExtra(f"{why} needs {module}; pip install 'seqloom[{extra}]' brings it")

    digit_files.digits.cache_clear()
    monkeypatch.setattr(digit_files, "require_extra", absent)
    with pytest.raises(MissingExtra, match="seqloom\\[sklearn\\]"):
        DigitPatches().sample(2, torch.Generator())
    digit_files.digits.cache_clear()

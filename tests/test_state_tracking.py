"""State-tracking tasks: groups and their tables, running products, and brackets, against plain loops."""

from __future__ import annotations

import pytest
import torch

from seqloom.core import BadInput
from seqloom.tasks import IGNORE, DyckPrefix, ModularCounting, Parity, WordProblem
from seqloom.tasks.synthetic.state_tracking import elements, running_product, table


def make(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("group", "size"), [
    ("S3", 6), ("A4", 12), ("S4", 24), ("A5", 60), ("S5", 120), ("Z2", 2), ("Z7", 7), ("D3", 6), ("D12", 24)])
def test_a_group_has_its_elements_and_products(group, size):
    rows, products = elements(group), table(group)
    assert len(set(map(tuple, rows.tolist()))) == size == len(rows)
    assert rows[0].tolist() == list(range(rows.shape[1]))
    for g in range(0, size, max(1, size // 7)):
        for h in range(size):
            assert rows[products[g, h]].tolist() == rows[g][rows[h]].tolist()  # closed, and h first


def test_a_running_product_multiplies_from_the_left():
    word = torch.randint(60, (3, 21), generator=make())
    found, rows = running_product(word, "A5"), elements("A5")
    for b in range(3):
        now = torch.arange(5)
        for t in range(21):
            now = rows[word[b, t]][now]
            assert rows[found[b, t]].tolist() == now.tolist()


@pytest.mark.parametrize("name", ["Q3", "S", "S1", "A2", "D2", "S7", "S99", "Z721", "s3"])
def test_other_names_are_refused_with_one_that_works(name):
    with pytest.raises(BadInput, match=r"such as S3|largest of its kind"):
        WordProblem(group=name)


def test_a_word_starts_with_its_token_and_is_drawn_alike_from_one_seed():
    task = WordProblem(group="S3", length=9, test_lengths=(30,))
    ids, targets = task.sample(5, make())
    assert (ids[:, 0] == 6).all() and (targets[:, 0] == IGNORE).all() and ids.shape == targets.shape == (5, 10)
    assert torch.equal(ids, task.sample(5, make())[0]) and not torch.equal(ids, task.sample(5, make(1))[0])
    assert task.tests()["at_30_tokens"].sample(2, make()).inputs.shape == (2, 31)


def test_parity_and_counting_are_sums():
    for task, modulus in ((Parity(length=20), 2), (ModularCounting(modulus=5, length=20), 5)):
        ids, targets = task.sample(50, make())
        assert torch.equal(targets[:, 1:], ids[:, 1:].cumsum(1) % modulus)
        share = targets[:, -1].bincount(minlength=modulus) / 50
        assert (share > 0.3 / modulus).all() and task.chance == 1 / modulus


def test_brackets_are_nested_and_the_innermost_is_asked_for():
    task = DyckPrefix(kinds=3, depth=4, length=40)
    ids, targets = task.sample(100, make())
    counts, deepest = torch.zeros(3), 0
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        opened = []
        for token, want in zip(row, wanted, strict=True):
            if token < 3:
                opened.append(token)
            else:
                assert opened.pop() == token - 3
            deepest = max(deepest, len(opened))
            assert want == (opened[-1] if token >= 3 and opened else IGNORE)
            counts += torch.tensor([want == kind for kind in range(3)])
    assert deepest == 4 and (counts / counts.sum() - task.chance).abs().max() < 0.05
    with pytest.raises(ValueError, match="depth >= 2"):
        DyckPrefix(depth=1)

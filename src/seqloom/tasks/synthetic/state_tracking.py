"""Tasks that can only be solved by keeping a state up to date: products in a group, sums modulo m, open brackets.

Each class draws an example, and states its chance level; the optimum is 1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.core import BadInput
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask, at_each

LARGEST = 720  # elements of a group: its table has the square of that


@functools.cache
def elements(group: str) -> Tensor:
    """The permutations of a group by name, [G, n], in lexicographic order: element 0 is the identity.

    S<n> all permutations of n points, A<n> the even ones, Z<n> the rotations of a ring of n, D<n> these and its mirror
    images. Row g maps point i to elements[g, i].
    Raises: BadInput for another name, or for more than 720 elements.
    """
    kind, number = group[:1], group[1:]
    n = int(number) if number.isdecimal() else 0
    if n < {"S": 2, "Z": 2, "A": 3, "D": 3}.get(kind, n + 1):
        raise BadInput(f"no group {group!r}; groups are S<n> and Z<n> (n from 2), A<n> and D<n> (n from 3), such as S3, A5, Z2")
    largest = {"S": 6, "A": 6, "Z": LARGEST, "D": LARGEST // 2}[kind]
    if n > largest:
        raise BadInput(f"{group} has more than {LARGEST} elements; the largest of its kind is {kind}{largest}")
    if kind in "SA":
        rows = list(itertools.permutations(range(n)))
        rows = [row for row in rows if kind == "S" or not _odd(row)]
    else:
        turns = [tuple((i + s) % n for i in range(n)) for s in range(n)]
        rows = sorted(turns + ([turn[::-1] for turn in turns] if kind == "D" else []))
    return torch.tensor(rows)


def _odd(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 1


@functools.cache
def table(group: str) -> Tensor:
    """Products [G, G]: table[g, h] is g after h, the permutation that maps i to g(h(i))."""
    rows = elements(group)
    size, n = rows.shape
    shown = rows[:, :2] if n > 6 else rows  # rings and their mirrors: where 0 goes and where 1 goes say which it is
    products = rows[:, None].expand(size, size, n).gather(2, shown[None].expand(size, -1, -1))
    base = n ** torch.arange(shown.shape[1] - 1, -1, -1)
    return torch.searchsorted((shown * base).sum(-1), (products * base).sum(-1))


def running_product(word: Tensor, group: str) -> Tensor:
    """word [B, T] of elements -> [B, T], the product of elements 1..t, newest leftmost: p_t = g_t p_{t-1}."""
    products, by = table(group), 1
    while by < word.shape[1]:  # twice as many factors each time
        word = torch.cat([word[:, :by], products[word[:, by:], word[:, :-by]]], 1)
        by *= 2
    return word


@dataclass(frozen=True, kw_only=True)
class WordProblem(TokenTask):
    """Random elements of a permutation group; after each, the product of all so far is wanted.

        > (12) (23) (13)  ->  . (12) (132) (12)...

    Ids: the elements in lexicographic order (0 is the identity), then a start token, which is where a model can store
    something to be permuted. Chance: 1 / |group|, since every product is equally likely. Source: [deltaproduct] section 5.1.
    """

    group: str = "S3"
    length: int = 24
    test_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        elements(self.group)  # says what is wrong with the name

    @property
    def classes(self) -> int:
        return len(elements(self.group))

    @property
    def vocab(self) -> int:
        return self.classes + 1

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        word = torch.randint(self.classes, (batch, self.length), generator=generator)
        start = torch.full((batch, 1), self.classes)
        answer = running_product(word, self.group)
        return Batch(torch.cat([start, word], 1), torch.cat([torch.full_like(start, IGNORE), answer], 1))

    def tests(self) -> Mapping[str, Task]:
        return at_each(self, "test_lengths", "length", "at_{}_tokens")


def ModularCounting(*, modulus: int = 3, length: int = 32, test_lengths: tuple[int, ...] = ()) -> WordProblem:
    """Numbers below `modulus`; after each, their sum so far modulo it: > 2 0 2 -> . 2 2 1. Chance: 1 / modulus."""
    return WordProblem(group=f"Z{modulus}", length=length, test_lengths=test_lengths)


def Parity(*, length: int = 32, test_lengths: tuple[int, ...] = ()) -> WordProblem:
    """Bits; after each, whether the ones so far are odd: > 1 0 1 1 -> . 1 1 0 1. Chance: 1 / 2."""
    return ModularCounting(modulus=2, length=length, test_lengths=test_lengths)


@dataclass(frozen=True, kw_only=True)
class DyckPrefix(TokenTask):
    """Well-nested brackets of several kinds, cut off: after a closing one, which kind is open innermost?

        ( [ ] { } ... -> . . ( . (

    Ids: opening 0..kinds-1, then closing. Depths are a random walk between 0 and `depth`; kinds are uniform. Asked where a
    bracket closes and another stays open, so that the last token does not give the answer. Chance: 1 / kinds.
    Source: [deltaproduct] (regular languages), bounded depth.
    """

    kinds: int = 3
    depth: int = 4
    length: int = 32
    test_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.depth < 2 or self.kinds < 2 or self.length < 3:
            raise ValueError(f"DyckPrefix: one bracket has to stay open while another closes, so depth >= 2, kinds >= 2 and "
                             f"length >= 3; found {self}")

    @property
    def vocab(self) -> int:
        return 2 * self.kinds

    @property
    def classes(self) -> int:
        return self.kinds

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        shape = (batch, self.length)
        # a free walk folded into 0..depth is a walk that turns back at both ends
        walk = (2 * torch.randint(2, shape, generator=generator) - 1).cumsum(1)
        height = self.depth - ((walk % (2 * self.depth)) - self.depth).abs()
        before = torch.nn.functional.pad(height, (1, 0))[:, :-1]
        opens = height > before
        kind = torch.randint(self.kinds, shape, generator=generator)
        # the bracket at level d is the latest that opened to it
        reaches = opens[..., None] & (height[..., None] == torch.arange(1, self.depth + 1))
        at = torch.where(reaches, torch.arange(self.length)[:, None], -1).cummax(1).values
        latest = lambda depth: kind.gather(1, at.gather(2, (depth - 1).clamp(min=0)[..., None])[..., 0].clamp(min=0))  # noqa: E731
        ids = torch.where(opens, kind, self.kinds + latest(before))
        return Batch(ids, torch.where(~opens & (height > 0), latest(height), IGNORE))

    def tests(self) -> Mapping[str, Task]:
        return at_each(self, "test_lengths", "length", "at_{}_tokens")

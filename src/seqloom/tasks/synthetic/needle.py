"""Finding a few bytes in a long text: pass keys hidden in filler sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqloom.core import BadInput
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask

FILLER = b"Rain fell on the river all day. The boats stayed in. Nobody came, and nobody left. Then it was night again. "
NEEDLE, QUESTION, END = b"<key Q is ", b"<key Q is ", b">"
NAME = NEEDLE.index(b"Q")


@dataclass(frozen=True, kw_only=True)
class PassKey(TokenTask):
    """A text of `length` bytes with pass keys in it; at its end one of them is asked for, byte by byte.

        ... stayed in. No<key D is 40213>body came, ... <key M is 77182> ... <key D is  -> 4 0 2 1 3

    Ids are bytes. The text is filler from a random place on, with `needles` keys under different letters put in at random,
    or, with one needle, at `depth` in [0, 1] of the text (0 is the far end). The digits are fed back as they should be
    (teacher forcing); a score is the share of digits. A fit reports more lengths as "at_4096_bytes", and `depths` as
    "at_depth_0.5".
    Chance: 1 / 10 (1 / 256 without knowing that digits follow). Optimum: 1.
    """

    length: int = 256
    digits: int = 5
    needles: int = 1
    depth: float | None = None
    test_lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()

    vocab = classes = 256
    chance = 0.1

    def __post_init__(self) -> None:
        if self.needles > 26 or self.needles < 1 or (self.depth is not None and self.needles != 1):
            raise BadInput(f"PassKey: 1 to 26 needles, and one where depth is given; found needles={self.needles}, "
                           f"depth={self.depth}")
        if self.slots < self.needles:
            raise BadInput(f"PassKey: {self.needles} keys of {self.digits} digits do not fit into length={self.length}; use "
                           f"{self._size * self.needles + len(QUESTION) + self.digits} or more")

    @property
    def _size(self) -> int:
        return len(NEEDLE) + self.digits + len(END)

    @property
    def slots(self) -> int:
        """Places for a needle that cannot overlap."""
        return max(self.length - len(QUESTION) - self.digits, 0) // self._size

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        body = self.length - len(QUESTION) - self.digits
        start = torch.randint(len(FILLER), (batch, 1), generator=generator)
        text = _bytes(FILLER)[(start + torch.arange(body)) % len(FILLER)]
        names = torch.rand(batch, 26, generator=generator).argsort(1)[:, : self.needles] + ord("A")
        code = torch.randint(10, (batch, self.needles, self.digits), generator=generator) + ord("0")
        # a needle anywhere: slots of a needle's size, all moved by what is left over
        if self.depth is not None:
            place = torch.full((batch, 1), round(self.depth * (body - self._size)))
        else:
            slot = torch.rand(batch, self.slots, generator=generator).argsort(1)[:, : self.needles]
            place = slot * self._size + torch.randint(body - self.slots * self._size + 1, (batch, 1), generator=generator)
        at = place[..., None] + torch.arange(self._size)
        text = text.scatter(1, at.flatten(1), torch.cat([_named(NEEDLE, names), code, _tile(END, names)], -1).flatten(1))
        asked, answer = _named(QUESTION, names[:, :1])[:, 0], code[:, 0]  # the first of them, which stands anywhere
        ids = torch.cat([text, asked, answer[:, :-1]], 1)
        targets = torch.full((batch, body + len(QUESTION) - 1), IGNORE)
        return Batch(ids, torch.cat([targets, answer], 1))

    def tests(self) -> Mapping[str, Task]:
        bare = replace(self, test_lengths=(), depths=())
        more = {f"at_{n}_bytes": replace(bare, length=n) for n in self.test_lengths}
        return {"score": bare, **more, **{f"at_depth_{share:g}": replace(bare, depth=share) for share in self.depths}}


def _bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text))


def _tile(text: bytes, names: Tensor) -> Tensor:
    return _bytes(text).expand(*names.shape, -1)


def _named(text: bytes, names: Tensor) -> Tensor:
    """`text` [B, N, L] with the letter of each name in Q's place."""
    where = torch.arange(len(text)) == NAME
    return torch.where(where, names[..., None], _tile(text, names))

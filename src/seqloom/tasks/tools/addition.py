"""Addition as a task for models, which are run with the tool in the loop. Source: [tool-use-ssm] Works when 6."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from seqloom.core import BadInput, Info
from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask
from seqloom.tasks.tools.agents import arithmetic
from seqloom.tasks.tools.environments import BLANK, Observation

WORDS = ("BOS", "+", "=", *map(str, range(10)), BLANK, "R", *(f"W{i}" for i in range(10)), "C0", "C1", "STOP", "PAD")
ID = {word: i for i, word in enumerate(WORDS)}
DIGIT, BLANKS, READ, WRITE, CARRY, STOP, PAD = (ID[word] for word in ("0", BLANK, "R", "W0", "C0", "STOP", "PAD"))


class AdditionTool:
    """The tool of `Addition`, in its words: R reads both numbers, least significant digit first, and moves on; W0 to W9
    write the answer; STOP ends. A thought (C0, C1) is not for the tool."""

    def __init__(self, a: Sequence[int], b: Sequence[int], blind: bool = False):
        self.memory = arithmetic("".join(map(str, a)), "".join(map(str, b)))
        self.memory.step("end a")
        self.memory.step("end b")
        self.blind, self.done = blind, False

    def step(self, command: str) -> Observation:
        if command == "R" and not self.blind:
            return self.memory.step("read a left") + self.memory.step("read b left")
        if command[0] == "W":
            self.memory.step(f"write sum {command[1:]} right")
        self.done |= command == "STOP"
        return ()

    @property
    def answer(self) -> str:
        """What was written, least significant digit first."""
        return self.memory.text("sum")


@dataclass(frozen=True, kw_only=True)
class Addition(TokenTask):
    """Two numbers of n digits are added, digit by digit; n is drawn from `least` to `digits` in every example.

        BOS 4 7 + 8 5 =  R 7 5 W2 C1  R 4 8 W3 C1  R _ _ W1 STOP       the answer is 132

    agent="tool": the digits after R come from the tool, and are not learnt; "thought": the model has to say them itself;
    "direct": W1 W3 W2 STOP follow at once, most significant digit first. What a model does is scored with the tool in the
    loop: it reads its own words and the tool's, greedily, and the answer that was written when it stops must be right. A
    fit reports n = `digits` as "score", and n of `test_digits` as "at_50_digits". Digits are uniform, leading zeros too.
    Chance: 10^-n. Optimum: 1.
    Source: [tool-use-ssm] Works when 6.
    """

    digits: int = 5
    least: int = 1
    agent: Literal["tool", "thought", "direct"] = "tool"
    test_digits: tuple[int, ...] = ()
    examples: int = 128

    vocab = classes = len(WORDS)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.digits:
            raise BadInput(f"Addition: n is drawn from least to digits, and {self.least} to {self.digits} is no range from 1")

    @property
    def chance(self) -> float:
        return 10.0**-self.digits

    def numbers(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Digits [B, 2, digits], least significant first, and n [B]."""
        sizes = torch.randint(self.least, self.digits + 1, (batch,), generator=generator)
        return torch.randint(10, (batch, 2, self.digits), generator=generator), sizes

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        numbers, sizes = self.numbers(batch, generator)
        ids, said = self.transcript(numbers, sizes)
        targets = torch.where(said[:, 1:], ids[:, 1:], IGNORE)
        return Batch(ids[:, :-1], targets)

    def transcript(self, numbers: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Question and trajectory [B, L], padded at the end, and which of its tokens the model has to say."""
        batch, _, longest = numbers.shape
        place = torch.arange(longest)
        inside = place < sizes[:, None]
        numbers = torch.where(inside[:, None], numbers, 0)
        total, carry, sums, carries = numbers.sum(1), torch.zeros(batch, dtype=torch.int64), [], []
        for column in total.unbind(1):
            sums.append((column + carry) % 10)
            carry = (column + carry) // 10
            carries.append(carry)
        sums, carries = torch.stack(sums, 1), torch.stack(carries, 1)
        last = carries.gather(1, sizes[:, None] - 1)[:, 0]
        turned = (sizes[:, None] - 1 - place).clamp(min=0)
        # pieces of fixed width with blanks that are squeezed out at the end
        fill = lambda width, word: torch.full((batch, width), word)  # noqa: E731
        front = lambda x, shift: torch.where(inside, x.gather(1, turned) + shift, PAD)  # noqa: E731
        a, b = numbers.unbind(1)
        question = torch.cat([fill(1, ID["BOS"]), front(a, DIGIT), fill(1, ID["+"]), front(b, DIGIT), fill(1, ID["="])], 1)
        top = torch.where(last > 0, WRITE + 1, PAD)[:, None]
        if self.agent == "direct":
            answer = torch.cat([top, front(sums, WRITE), fill(1, STOP)], 1)
            said = answer != PAD
        else:
            read, seen = fill(longest, READ), self.agent == "thought"
            turn = torch.stack([read, DIGIT + a, DIGIT + b, WRITE + sums, CARRY + carries], 2)
            turn = torch.where(inside[..., None], turn, PAD).flatten(1)
            own = torch.tensor([True, seen, seen, True, True]).expand(batch, longest, 5).flatten(1)
            answer = torch.cat([turn, fill(1, READ), fill(2, BLANKS), top, fill(1, STOP)], 1)
            said = torch.cat([own, torch.tensor([True, seen, seen, True, True]).expand(batch, 5)], 1) & (answer != PAD)
        ids = torch.cat([question, answer], 1)
        said = torch.cat([torch.zeros_like(question, dtype=torch.bool), said], 1)
        order = torch.argsort((ids == PAD).to(torch.int8), dim=1, stable=True)
        ids, said = ids.gather(1, order), said.gather(1, order)
        longest = int((ids != PAD).sum(1).max())
        return ids[:, :longest], said[:, :longest]

    def tests(self) -> Mapping[str, Task]:
        at = lambda n: replace(self, digits=n, least=n, test_digits=())  # noqa: E731
        return {"score": at(self.digits), **{f"at_{n}_digits": at(n) for n in self.test_digits}}

    @torch.no_grad()
    def score(self, model: SequenceModelLayer, seed: int) -> float:
        """The share of problems that the model solves with the tool in the loop."""
        numbers, sizes = self.numbers(self.examples, torch.Generator().manual_seed(seed))
        ids, said = self.transcript(numbers, sizes)
        # what the model says first is where its part begins: all before it is the question
        questions = [row[: int(mine.int().argmax())].tolist() for row, mine in zip(ids, said, strict=True)]
        lasts = [n.flip(-1)[:, self.digits - size :].tolist() for n, size in zip(numbers, sizes.tolist(), strict=True)]
        tools = [AdditionTool(a, b, blind=self.agent != "tool") for a, b in lasts]
        rollout(model, tools, questions, limit=max(int((row != PAD).sum()) - len(question)
                                                   for row, question in zip(ids, questions, strict=True)))
        right = 0
        for tool, (a, b) in zip(tools, lasts, strict=True):
            total = str(int("".join(map(str, a))) + int("".join(map(str, b)))).zfill(len(a))
            right += tool.done and tool.answer == (total if self.agent == "direct" else total[::-1])
        return right / self.examples


@torch.no_grad()
def rollout(model: SequenceModelLayer, tools: Sequence[AdditionTool], questions: Iterable[Sequence[int]], *,
            limit: int) -> list[list[int]]:
    """Let the model speak, greedily, with a tool a row, for `limit` tokens at most; returns what was said, both sides.

    Each word of the model goes to its tool, and what that answers is fed to the model before its next word is asked for. The
    model's state is carried from word to word: nothing is read twice.
    """
    questions = [list(question) for question in questions]
    device = next(model.parameters()).device
    model.eval()
    longest = max(map(len, questions))
    ids = torch.tensor([[PAD] * (longest - len(question)) + question for question in questions], device=device)
    padded = min(map(len, questions)) < longest
    info = Info(segments=(ids != PAD).long()) if padded else Info()
    output = model(ids, info=info, keep=1)
    said: list[list[int]] = [[] for _ in questions]
    waiting: list[list[int]] = [[] for _ in questions]  # what the tool has answered and the model has not read
    for _ in range(limit):
        guess = output.logits[:, -1].argmax(-1).tolist()
        for row, tool in enumerate(tools):
            if tool.done:
                continue
            if waiting[row]:
                said[row].append(waiting[row].pop(0))
                continue
            said[row].append(guess[row])
            waiting[row] = [ID.get(word, BLANKS) for word in tool.step(WORDS[guess[row]])]
        if all(tool.done for tool in tools):
            break
        heard = torch.tensor([[row[-1]] for row in said], device=device)
        output = model(heard, state=output.state)
    return said

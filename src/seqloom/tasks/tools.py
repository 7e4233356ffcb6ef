"""Tools with a memory, the trajectories of agents that use them, and models that are run with the tool in the loop.

A tool answers a command with an observation, a tuple of words; a command it cannot follow is answered ("error", why), never
raised, since a model has to be told. An agent is a generator that yields commands and is sent observations; the ones here keep
a bounded number of symbols in mind and leave the rest to the tool, so that a problem of any size is within their reach.
Source: [tool-use-ssm] Method 3, 6 and 7.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from seqloom.core import BadInput, Info
from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask

BLANK = "_"
Observation = tuple[str, ...]
Agent = Generator[str, Observation, None]  # yields commands, is sent observations


@runtime_checkable
class ToolEnv(Protocol):
    """What a model may act on. `step` never raises: what cannot be done is an observation that says so."""

    def step(self, command: str) -> Observation: ...


class PointerMemory:
    """Tapes of symbols without an end, and heads that stand on them.

        memory = PointerMemory({"a": "47", "b": "85", "sum": ""}, heads={"a": "a", "b": "b", "sum": "sum"})
        memory.step("end a")            ()          the head stands on the last symbol
        memory.step("read a left")      ("7",)      the symbol under the head, which then moves
        memory.step("write sum 2 right")  ()
        memory.step("goto sum base")    ()          a head goes where another one of its tape stands

    tapes: name -> text. heads: name -> tape; every head starts on the first symbol. A cell without a symbol reads as "_".
    """

    moves: Mapping[str, int] = {"left": -1, "right": 1}

    def __init__(self, tapes: Mapping[str, str], heads: Mapping[str, str]):
        unknown = [tape for tape in heads.values() if tape not in tapes]
        if unknown:
            raise BadInput(f"PointerMemory: a head stands on the tape {unknown[0]!r}, and there are {', '.join(tapes)}")
        self.cells = {name: dict(enumerate(text)) for name, text in tapes.items()}
        self.heads = dict(heads)
        self.at = dict.fromkeys(heads, 0)

    def step(self, command: str) -> Observation:
        verb, *words = command.split() or [""]
        sizes = {"read": (1, 2), "write": (2, 3), "move": (2, 2), "end": (1, 1), "goto": (2, 2)}
        if verb not in sizes:
            return "error", f"no command {verb!r}"
        least, most = sizes[verb]
        if not least <= len(words) <= most:
            return "error", f"{verb} takes {least} to {most} words"
        head = words[0]
        if head not in self.heads:
            return "error", f"no head {head!r}"
        move = words[-1] if verb == "move" or len(words) == most > least else None
        if move is not None and move not in self.moves:
            return "error", f"no move {move!r}"
        cells, seen = self.cells[self.heads[head]], ()
        if verb == "read":
            seen = (cells.get(self.at[head], BLANK),)
        elif verb == "write":
            cells[self.at[head]] = words[1]
        elif verb == "end":
            self.at[head] = max(cells, default=0)
        elif verb == "goto":
            if self.heads.get(words[1]) != self.heads[head]:
                return "error", f"{words[1]!r} is no head on the tape of {head!r}"
            self.at[head] = self.at[words[1]]
        if move is not None:
            self.at[head] += self.moves[move]
        return seen

    def text(self, tape: str) -> str:
        """What stands on a tape, from its first symbol to its last."""
        cells = self.cells[tape]
        return "".join(cells.get(i, BLANK) for i in range(min(cells), max(cells) + 1)) if cells else ""


class SearchTool:
    """Lines of a text, found by a word: `find x` returns the numbers of the lines that have it, `line 3` the words of one."""

    def __init__(self, lines: Sequence[str]):
        self.lines = [tuple(line.split()) for line in lines]

    def step(self, command: str) -> Observation:
        verb, *words = command.split() or [""]
        if len(words) != 1 or verb not in ("find", "line"):
            return "error", "find WORD, or line NUMBER"
        if verb == "find":
            return tuple(str(i) for i, line in enumerate(self.lines) if words[0] in line)
        if not words[0].isdigit() or int(words[0]) >= len(self.lines):
            return "error", f"no line {words[0]!r}"
        return self.lines[int(words[0])]


class Pegs:
    """The Tower of Hanoi: three pegs, disks 1 (smallest) to n on the first. `move 0 2` answers with the three top disks."""

    def __init__(self, disks: int):
        self.pegs = [list(range(disks, 0, -1)), [], []]

    def step(self, command: str) -> Observation:
        words = command.split()
        if len(words) != 3 or words[0] != "move" or not {words[1], words[2]} <= {"0", "1", "2"}:
            return "error", "move FROM TO, each of 0, 1, 2"
        source, target = self.pegs[int(words[1])], self.pegs[int(words[2])]
        if not source or (target and target[-1] < source[-1]) or source is target:
            return "error", "that disk cannot go there"
        target.append(source.pop())
        return tuple(str(peg[-1]) if peg else BLANK for peg in self.pegs)


# Agents ---------------------------------------------------------------------------------------------------------------

def adding() -> Agent:
    """a + b onto the tape "sum", least significant digit first. In mind: a carry and two digits."""
    yield "end a"
    yield "end b"
    carry = 0
    while True:
        (a,), (b,) = (yield "read a left"), (yield "read b left")
        if a == b == BLANK:
            break
        total = carry + sum(int(digit) for digit in (a, b) if digit != BLANK)
        yield f"write sum {total % 10} right"
        carry = total // 10
    if carry:
        yield "write sum 1 right"


def multiplying() -> Agent:
    """a times b onto the tape "sum", least significant digit first, as in school. In mind: a carry and three digits.

    Needs a second head on the tape of results, "base", where the row of the current digit of b begins.
    """
    yield "end b"
    while True:
        (b,) = yield "read b left"
        if b == BLANK:
            return
        yield "goto sum base"
        yield "end a"
        carry = 0
        while True:
            (a,) = yield "read a left"
            (old,) = yield "read sum"
            if a == BLANK and carry == 0:
                break
            total = carry + (0 if old == BLANK else int(old)) + (0 if a == BLANK else int(a) * int(b))
            yield f"write sum {total % 10} right"
            carry = total // 10
        yield "move base right"


def searching(start: str, goal: str) -> Agent:
    """Whether `goal` follows from `start` in lines "x y" (x implies y), depth first; the stack and what was seen are tapes.

    In mind: two names. Ends on the command "answer yes" or "answer no", which a tool does not know.
    """
    yield f"write stack {start} right"
    while True:
        yield "move stack left"
        (name,) = yield "read stack"
        if name == BLANK:
            yield "answer no"
            return
        yield f"write stack {BLANK}"
        if name == goal:
            yield "answer yes"
            return
        yield "goto seen first"
        while (other := (yield "read seen right")[0]) not in (BLANK, name):
            pass
        if other == name:
            continue
        yield "move seen left"
        yield f"write seen {name}"
        for number in (yield f"find {name}"):
            source, target = yield f"line {number}"
            if source == name:
                yield f"write stack {target} right"


def stacking(even: bool) -> Agent:
    """All disks to the last peg: the smallest goes round, and every other move is the only one without it. In mind: its peg,
    and whether the number of disks is even."""
    small, tops, way = 0, (), 1 if even else -1
    while True:
        to = (small + way) % 3
        tops = yield f"move {small} {to}"
        small = to
        one, two = (peg for peg in range(3) if peg != small)
        if tops[one] == tops[two] == BLANK:
            return
        if tops[one] == BLANK or (tops[two] != BLANK and int(tops[two]) < int(tops[one])):
            one, two = two, one
        tops = yield f"move {one} {two}"


class Both:
    """Two tools as one: the first that knows a command's verb answers."""

    def __init__(self, first: tuple[str, ...], one: ToolEnv, other: ToolEnv):
        self.first, self.one, self.other = first, one, other

    def step(self, command: str) -> Observation:
        return (self.one if command.split()[:1] and command.split()[0] in self.first else self.other).step(command)


class Turn(NamedTuple):
    command: str
    observation: Observation


class Trajectory(NamedTuple):
    """A problem in words, the turns of an agent that solves it, its answer, and the right one."""

    question: str
    turns: tuple[Turn, ...]
    answer: str
    wanted: str


def act(agent: Agent, env: ToolEnv, limit: int = 1_000_000) -> tuple[Turn, ...]:
    """Run an agent against a tool to its end.

    Raises: RuntimeError when `limit` turns do not suffice.
    """
    turns: list[Turn] = []
    try:
        command = next(agent)
        while len(turns) < limit:
            seen = env.step(command)
            turns.append(Turn(command, seen))
            command = agent.send(seen)
    except StopIteration:
        return tuple(turns)
    raise RuntimeError(f"the agent did not end within {limit} turns")


def generate_trajectory(task: Literal["addition", "multiplication", "search", "hanoi"], n: int,
                        rng: random.Random) -> Trajectory:
    """A random problem of size `n` (digits, digits of the first factor, names, disks), solved by the agent for it."""
    if task in ("addition", "multiplication"):
        a, b = rng.randrange(10**n), rng.randrange(10 ** (n if task == "addition" else rng.choice((1, 2))))
        memory = arithmetic(str(a), str(b))
        turns = act(adding() if task == "addition" else multiplying(), memory)
        answer = memory.text("sum")[::-1].lstrip("0") or "0"
        return Trajectory(f"{a} {'+' if task == 'addition' else '*'} {b}", turns, answer,
                          str(a + b if task == "addition" else a * b))
    if task == "search":
        names = [f"x{i}" for i in range(n)]
        edges = [(rng.choice(names), rng.choice(names)) for _ in range(2 * n)]
        start, goal = rng.choice(names), rng.choice(names)
        env = Both(("find", "line"), SearchTool([" ".join(edge) for edge in edges]),
                   PointerMemory({"stack": "", "seen": ""}, {"stack": "stack", "seen": "seen", "first": "seen"}))
        turns = act(searching(start, goal), env)
        known = {start}
        for _ in names:
            known |= {target for source, target in edges if source in known}
        wanted = "yes" if goal in known else "no"
        return Trajectory(f"{start} to {goal} in {edges}", turns, turns[-1].command.split()[1], wanted)
    if task == "hanoi":
        env = Pegs(n)
        turns = act(stacking(n % 2 == 0), env)
        return Trajectory(f"{n} disks", turns, str(env.pegs), str([[], [], list(range(n, 0, -1))]))
    raise BadInput(f"no task {task!r} with a tool; there are addition, multiplication, search and hanoi")


def arithmetic(a: str, b: str) -> PointerMemory:
    """The memory that `adding` and `multiplying` work on."""
    return PointerMemory({"a": a, "b": b, "sum": ""}, {"a": "a", "b": "b", "sum": "sum", "base": "sum"})


# Addition as a task for models ------------------------------------------------------------------------------------------

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

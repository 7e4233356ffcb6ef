"""Agents that use a tool, and their trajectories.

An agent is a generator that yields commands and is sent observations; the ones here keep a bounded number of symbols in mind
and leave the rest to the tool, so that a problem of any size is within their reach. Source: [tool-use-ssm] Method 6 and 7.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Literal, NamedTuple

from seqloom.core import BadInput
from seqloom.tasks.tools.environments import BLANK, Both, Observation, Pegs, PointerMemory, SearchTool, ToolEnv

Agent = Generator[str, Observation, None]  # yields commands, is sent observations


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
    small, way = 0, 1 if even else -1
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
        tower = Pegs(n)
        turns = act(stacking(n % 2 == 0), tower)
        return Trajectory(f"{n} disks", turns, str(tower.pegs), str([[], [], list(range(n, 0, -1))]))
    raise BadInput(f"no task {task!r} with a tool; there are addition, multiplication, search and hanoi")


def arithmetic(a: str, b: str) -> PointerMemory:
    """The memory that `adding` and `multiplying` work on."""
    return PointerMemory({"a": a, "b": b, "sum": ""}, {"a": "a", "b": "b", "sum": "sum", "base": "sum"})

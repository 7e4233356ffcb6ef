"""Tools with a memory. A tool answers a command with an observation, a tuple of words.

A command it cannot follow is answered ("error", why), never raised, since a model has to be told.
Source: [tool-use-ssm] Method 3 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from seqloom.core import BadInput

BLANK = "_"
Observation = tuple[str, ...]


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
        cells = self.cells[self.heads[head]]
        seen: Observation = ()
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


class Both:
    """Two tools as one: the first that knows a command's verb answers."""

    def __init__(self, first: tuple[str, ...], one: ToolEnv, other: ToolEnv):
        self.first, self.one, self.other = first, one, other

    def step(self, command: str) -> Observation:
        return (self.one if command.split()[:1] and command.split()[0] in self.first else self.other).step(command)

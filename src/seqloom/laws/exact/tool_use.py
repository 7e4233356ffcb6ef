"""Tools and the agents that use them; what a machine of few states can and cannot answer."""

from __future__ import annotations

import random

import torch

from seqloom.mixers import GRU
from seqloom.models import Block, Stack
from seqloom.tasks import IGNORE, Addition, generate_trajectory
from seqloom.tasks.tools.addition import CARRY, ID, STOP, WORDS, AdditionTool

SIZES = {"addition": (1, 2, 5, 50, 1000), "multiplication": (1, 5, 30), "search": (3, 10, 40), "hanoi": (1, 2, 3, 6, 10)}


def agents_fail() -> float:
    """The share of problems that the agents answer wrongly, or with a command that their tool refuses."""
    wrong = []
    for task, sizes in SIZES.items():
        for size in sizes:
            found = generate_trajectory(task, size, random.Random(size))  # type: ignore[arg-type]
            # the answer is the one word that is said to nobody
            refused = any(seen[:1] == ("error",) for command, seen in found.turns if not command.startswith("answer"))
            wrong.append(refused or found.answer != found.wanted)
    return sum(wrong) / len(wrong)


def transcripts_differ(*, problems: int = 50, digits: int = 7) -> float:
    """The share of rows of `Addition` that differ from what its words, one by one, get from the tool; and of trajectories
    that differ when the same problem is solved again."""
    task = Addition(digits=digits)
    numbers, sizes = task.numbers(problems, torch.Generator().manual_seed(0))
    ids, said = task.transcript(numbers, sizes)
    wrong = [generate_trajectory(name, 5, random.Random(1)) != generate_trajectory(name, 5, random.Random(1))
             for name in SIZES]  # type: ignore[arg-type]
    for row, own, pair, size in zip(ids.tolist(), said.tolist(), numbers, sizes.tolist(), strict=True):
        a, b = pair[:, :size].flip(-1).tolist()
        tool, waiting, differs = AdditionTool(a, b), [], False
        question = [ID["BOS"], *(ID[str(d)] for d in a), ID["+"], *(ID[str(d)] for d in b), ID["="]]
        differs |= row[: len(question)] != question
        for word, mine in zip(row[len(question) :], own[len(question) :], strict=True):
            if tool.done:
                break
            differs |= mine == bool(waiting)  # it is the model's turn where nothing is left to hear
            if waiting:
                differs |= waiting.pop(0) != WORDS[word]
            else:
                waiting = list(tool.step(WORDS[word]))
        total = int("".join(map(str, a))) + int("".join(map(str, b)))
        wrong.append(differs or not tool.done or tool.answer[::-1] != str(total).zfill(size))
    return sum(wrong) / len(wrong)


def most_answers(*, states: int = 4, bits: int = 3) -> float:
    """The most strings of `bits` bits that any machine of `states` states repeats from memory: it reads one, then speaks, and
    hears what it says. Over all tables of updates and outputs, exhaustively ([tool-use-ssm] Theorem 2.1)."""
    tables = states ** (2 * states)
    code = torch.arange(tables)
    update = torch.stack([code // states**place % states for place in range(2 * states)], 1).to(torch.int8)  # [M, S * 2]
    problems = torch.arange(2**bits)
    symbols = torch.stack([problems // 2**place % 2 for place in range(bits)], 1)
    read = torch.zeros(tables, len(problems), dtype=torch.int8)

    def follow(state: torch.Tensor, symbol: torch.Tensor) -> torch.Tensor:
        return update.gather(1, state.long() * 2 + symbol.long())

    for place in range(bits):
        read = follow(read, symbols[:, place].expand_as(read))
    best = 0
    for outputs in range(2**states):
        table = torch.tensor([outputs >> state & 1 for state in range(states)])
        state, right = read, torch.ones_like(read, dtype=torch.bool)
        for place in range(bits):
            word = table[state.long()]
            right = right & (word == symbols[:, place])
            state = follow(state, word)
        best = max(best, int(right.sum(1).max()))
    return float(best)


def memorised(*, digits: int = 2, test_digits: int = 50, problems: int = 100) -> float:
    """The share of sums of `test_digits` digits that a learner adds which has memorised, for all sums of 1 to `digits` digits,
    the word that follows each run of words since the last carry: a machine of finitely many states ([tool-use-ssm]
    Theorem 2.2)."""
    known: dict[tuple[int, ...], int] = {}
    begins = {ID["="], CARRY, CARRY + 1}
    for size in range(1, digits + 1):
        both = torch.arange(10 ** (2 * size))
        figures = torch.stack([both // 10**place % 10 for place in range(2 * size)], 1).unflatten(1, (2, size))
        ids, own = Addition(digits=size, least=size).transcript(figures, torch.full((len(both),), size))
        for row, mine in zip(ids.tolist(), own.tolist(), strict=True):
            state: tuple[int, ...] = ()
            for word, speaks in zip(row, mine, strict=True):
                if speaks:
                    known[state] = word
                state = (word,) if word in begins else (*state, word)
    task, right = Addition(digits=test_digits, least=test_digits), 0
    numbers, _ = task.numbers(problems, torch.Generator().manual_seed(0))
    for a, b in numbers.flip(-1).tolist():
        tool, state = AdditionTool(a, b), (ID["="],)
        for _ in range(6 * test_digits + 6):
            word = known.get(state)
            if word is None or word == STOP:
                break
            heard = (word, *(ID[seen] for seen in tool.step(WORDS[word])))
            state = (word,) if word in begins else (*state, *heard)
        total = int("".join(map(str, a))) + int("".join(map(str, b)))
        right += word == STOP and tool.answer[::-1] == str(total).zfill(test_digits)
    return right / problems


def gradient_of_observations() -> float:
    """The largest gradient of the loss with respect to the scores of a word that the model does not say itself."""
    task = Addition(digits=4)
    inputs, targets = task.sample(8, torch.Generator().manual_seed(0))
    logits = torch.randn(*inputs.shape, task.classes, generator=torch.Generator().manual_seed(1), requires_grad=True)
    task.loss(_Scores(logits), targets).backward()  # type: ignore[arg-type]
    return float(logits.grad[targets == IGNORE].abs().max())


class _Scores:
    def __init__(self, logits: torch.Tensor):
        self.logits = logits


def streaming_differs(*, digits: int = 12) -> float:
    """Largest difference in float32 between the scores of a transcript said word by word, the state carried along, and those
    of the same transcript read as a whole."""
    torch.manual_seed(0)
    task = Addition(digits=digits, least=digits)
    model = task.wrap(Stack(dim=32, blocks=(Block(mixer=GRU(), mlp=None),) * 2)).build().eval()
    numbers, sizes = task.numbers(4, torch.Generator().manual_seed(0))
    ids, said = task.transcript(numbers, sizes)
    start = int(said[0].int().argmax())
    with torch.no_grad():
        scores = model(ids).logits
        output, worst = model(ids[:, :start]), 0.0
        for t in range(start, ids.shape[1]):
            worst = max(worst, float((output.logits[:, -1] - scores[:, t - 1]).abs().max()))
            output = model(ids[:, t : t + 1], state=output.state)
    return worst

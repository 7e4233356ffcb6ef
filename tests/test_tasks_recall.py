"""Generated tasks say what they claim: every answer is found again by reading the example as their drawings do."""

import random

import pytest
import torch

from seqloom.core import BadInput
from seqloom.laws.exact import tool_use
from seqloom.mixers import GRU, SoftmaxAttention
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.heads import TokenHead
from seqloom.models.stems import TokenStem
from seqloom.tasks import (
    IGNORE,
    Addition,
    JointRecall,
    LatestPairRecall,
    LatestValueRecall,
    Lego,
    MultiQueryRecall,
    PassKey,
    PointerMemory,
    SearchTool,
    generate_trajectory,
    rollout,
)
from seqloom.tasks.tools.addition import ID, WORDS, AdditionTool
from seqloom.tasks.tools.environments import Pegs


def rows(task, batch=40, seed=0):
    inputs, targets = task.sample(batch, torch.Generator().manual_seed(seed))
    again, _ = task.sample(batch, torch.Generator().manual_seed(seed))
    assert torch.equal(inputs, again)
    assert inputs.shape == targets.shape and int(inputs.max()) < task.vocab
    return zip(inputs.tolist(), targets.tolist(), strict=True)


@pytest.mark.parametrize("fillers", ["blank", "random"])
def test_multi_query_recall(fillers):
    task = MultiQueryRecall(pairs=5, keys=12, values=9, length=41, fillers=fillers)
    for ids, targets in rows(task):
        assert len(ids) == 41
        book = dict(zip(ids[:10:2], ids[1:10:2], strict=True))
        asked = [(key, target) for key, target in zip(ids[10:], targets[10:], strict=True) if target != IGNORE]
        assert sorted(key for key, _ in asked) == sorted(book)
        assert all(task.keys + target == book[key] for key, target in asked)
        assert sum(key in book for key in ids[10:]) == 5  # no filler is a key that was given


def test_joint_recall():
    task = JointRecall(contexts=3, keys=4, values=7, questions=5)
    for ids, targets in rows(task):
        book, at = {}, 0
        for _ in range(3):
            for pair in range(4):
                book[ids[at], ids[at + 1 + 2 * pair]] = ids[at + 2 + 2 * pair]
            at += 9
        for place in range(at, len(ids), 2):
            assert book[ids[place], ids[place + 1]] == task.contexts + task.keys + targets[place + 1]


def test_one_token_a_pair_is_another_layout_of_the_same_recall():
    settings = dict(keys=5, values=9, writes=12)
    plain, pairs = LatestValueRecall(**settings), LatestPairRecall(**settings, test_writes=(14, 20))
    draw = lambda task: task.sample(8, torch.Generator().manual_seed(0))  # noqa: E731
    (ids, targets), (two, wanted) = draw(plain), draw(pairs)
    assert torch.equal(ids[:, :24].unflatten(1, (12, 2)), two[:, :12])
    assert torch.equal(ids[:, 24:], two[:, 12:, 0]) and (two[:, 12:, 1] == pairs.vocab - 1).all()
    assert torch.equal(targets[:, 24:], wanted[:, 12:]) and (wanted[:, :12] == IGNORE).all()
    assert {name: task.writes for name, task in pairs.tests().items()} == {"score": 12, "at_14_writes": 14, "at_20_writes": 20}


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
@pytest.mark.parametrize("asked", [None, 3])
def test_lego(order, asked):
    task = Lego(chain=5, variables=9, values=3, order=order, asked=asked)
    for ids, targets in rows(task):
        clauses = {ids[i]: (ids[i + 1], ids[i + 2] - task.variables - 1) for i in range(0, 15, 3)}

        def value(name, clauses=clauses):
            if name == task.variables:
                return 0, 0
            total, depth = value(clauses[name][0])
            return (total + clauses[name][1]) % 3, depth + 1

        for name, target in zip(ids[15:], targets[15:], strict=True):
            assert value(name)[0] == target
            assert asked in (None, value(name)[1])


@pytest.mark.parametrize("task", [PassKey(length=150, needles=4), PassKey(length=90, depth=0.0), PassKey(length=90, depth=1.0)])
def test_pass_key(task):
    for ids, targets in rows(task):
        text, code = bytes(ids), bytes(x for x in targets if x != IGNORE)
        question = text[-len(b"<key Q is ") - 4 : -4]
        assert len(ids) == task.length - 1 and text.count(b"<key ") == task.needles + 1
        assert text.index(question + code + b">") + 16 <= len(text) - 14  # it stands before the question
        if task.depth is not None:
            assert text.index(b"<key") == (0 if task.depth == 0 else 90 - 15 - 16)


def test_what_does_not_fit_is_refused():
    for make in (lambda: PassKey(length=20), lambda: PassKey(needles=2, depth=0.5), lambda: Lego(chain=20),
                 lambda: MultiQueryRecall(pairs=8, length=20), lambda: Addition(digits=3, least=5)):
        with pytest.raises(BadInput):
            make()


# Tools --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["", "fly", "read", "read x", "write a", "read a up", "goto a b", "move a", "end a b"])
def test_a_malformed_command_is_an_observation(command):
    memory = PointerMemory({"a": "12", "b": "3"}, {"a": "a", "b": "b"})
    assert memory.step(command)[0] == "error"
    assert memory.text("a") == "12" and memory.step("read a") == ("1",)


def test_other_tools_refuse_alike():
    assert SearchTool(["a b"]).step("line 3")[0] == "error" and SearchTool(["a b", "b c"]).step("find b") == ("0", "1")
    pegs = Pegs(2)
    assert pegs.step("move 1 0")[0] == "error" and pegs.step("move 0 1") == ("2", "1", "_")
    assert pegs.step("move 0 1")[0] == "error" and pegs.pegs == [[2], [1], []]


def test_a_wrong_answer_is_seen():
    found = generate_trajectory("multiplication", 6, random.Random(3))
    assert found.answer == found.wanted and found.turns[-1].observation == ("_",)
    assert tool_use.agents_fail() == tool_use.transcripts_differ(problems=20) == 0


def scripted(a, b, agent):
    """A model that knows the trajectory by heart, as scores: it says word t of it after t words."""
    task = Addition(digits=len(a), least=len(a), agent=agent)
    numbers = torch.tensor([[a[::-1], b[::-1]]])
    ids, said = task.transcript(numbers, torch.tensor([len(a)]))
    start = int(said[0].int().argmax())
    return ids[0, :start].tolist(), ids[0, start:].tolist()


class Parrot(torch.nn.Module):
    def __init__(self, words):
        super().__init__()
        self.words = words
        self.place = torch.nn.Parameter(torch.zeros(()))

    def forward(self, ids, *, state=None, info=None, keep=0):
        heard = 0 if state is None else state + ids.shape[1]
        scores = torch.nn.functional.one_hot(torch.tensor(self.words[min(heard, len(self.words) - 1)]), len(WORDS)).float()
        return type("Out", (), {"logits": scores.expand(ids.shape[0], 1, -1), "state": heard})


@pytest.mark.parametrize("agent", ["tool", "thought", "direct"])
def test_a_rollout_with_the_right_words_solves_the_sum(agent):
    a, b = [9, 0, 7], [3, 9, 8]
    question, words = scripted(a, b, agent)
    tool = AdditionTool(a, b, blind=agent != "tool")
    said = rollout(Parrot(words), [tool], [question], limit=len(words))
    assert said == [words] and tool.done
    assert tool.answer == ("1305" if agent == "direct" else "5031")
    wrong = [ID["W6"] if word == ID["W5"] else word for word in words]
    tool = AdditionTool(a, b, blind=agent != "tool")
    rollout(Parrot(wrong), [tool], [question], limit=len(words))
    assert tool.answer != "1305" and tool.answer != "5031"


def test_rollouts_of_unequal_questions_are_those_alone():
    torch.manual_seed(0)
    task = Addition(digits=3)
    model = task.wrap(Stack(dim=16, blocks=(Block(mixer=GRU(), mlp=None),))).build()
    questions = [scripted([1, 2], [3, 4], "tool")[0], scripted([5], [6], "tool")[0]]
    make = lambda: [AdditionTool([1, 2], [3, 4]), AdditionTool([5], [6])]  # noqa: E731
    together = rollout(model, make(), questions, limit=12)
    alone = [rollout(model, [tool], [question], limit=12)[0] for tool, question in zip(make(), questions, strict=True)]
    assert together == alone


# Learned positions ----------------------------------------------------------------------------------------------------

def test_learned_positions_go_on_from_the_state_and_count_in_segments():
    from seqloom.core import Info

    torch.manual_seed(0)
    stack = Stack(dim=16, blocks=(Block(mixer=SoftmaxAttention(heads=2, position="none")),))
    model = SequenceModel(stem=TokenStem(vocab=9, positions=12, std=1.0), stack=stack, head=TokenHead(classes=9, tie=False))
    model = model.build().double().eval()
    ids = torch.randint(9, (2, 12))
    whole = model(ids).logits
    first = model(ids[:, :5])
    torch.testing.assert_close(torch.cat([first.logits, model(ids[:, 5:], state=first.state).logits], 1), whole)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids[:, :8]], 1)
    segments = torch.tensor([[0] * 3 + [1] * 8] * 2)
    torch.testing.assert_close(model(padded, info=Info(segments=segments)).logits[:, 3:], whole[:, :8])
    with pytest.raises(ValueError, match="positions=13"):
        model(ids[:, :1], state=model(ids).state)

"""MemMamba: a Mamba that writes down what matters, in a pool that does not fade and does not grow."""

from seqloom.core import Budget, Check, Claim, Paper, above, beats
from seqloom.laws import exact
from seqloom.laws.exact import memory_pool
from seqloom.mixers import Mamba, MemMamba
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.sequence import language_model
from seqloom.tasks import FlaggedNotes

PAPER = Paper(
    slug="memmamba",
    number=85,
    title="MemMamba: Rethinking Memory Patterns in State Space Model",
    authors="Wang, Chen, Yan, Lu, Sun",
    year=2025,
    arxiv="2510.03279",
)


def model(*, dim: int = 768, depth: int = 24, mixer: MemMamba | Mamba = MemMamba()) -> Stack:
    """Blocks that take and read notes, without a channel mixer as in Mamba; pools of 50 notes of 64 numbers in each."""
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=None),) * depth)


def size_130m() -> SequenceModel:
    return language_model(vocab=50280, stack=model())


SMALL = MemMamba(mixer=Mamba(state=4, expand=1), pool=4, note_dim=6, block=3)
TOKEN = MemMamba(mixer=Mamba(state=4, expand=1), pool=4, note_dim=6, block=1)

CHECKS = (
    Check(
        text="token by token and in chunks: all forms agree",
        where="[memmamba] Forms and cost",
        measure=lambda: max(exact.forms_agree(SMALL), exact.forms_agree(TOKEN)),
        limit=1e-10,
    ),
    Check(
        text="without notes (threshold 1, or a pool of none) it is its Mamba",
        where="[memmamba] Works when 1",
        measure=memory_pool.reduces,
        limit=0.0,
    ),
    Check(
        text="with notes it is not (the check above can fail)",
        where="[memmamba] Works when 1",
        measure=lambda: memory_pool.reduces(threshold=0.0),
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="changing a token leaves earlier outputs alone, notes included",
        where="[memmamba] Works when 2",
        measure=lambda: max(exact.looks_ahead(SMALL), exact.looks_ahead(TOKEN)),
        limit=1e-12,
    ),
    Check(
        text="the pool holds the P notes of highest score of ended blocks",
        where="[memmamba] Works when 3",
        measure=lambda: memory_pool.wrong_slots("priority"),
        limit=0.0,
    ),
    Check(
        text="first in, first out: the pool holds the P newest",
        where="[memmamba] Works when 3",
        measure=lambda: memory_pool.wrong_slots("fifo"),
        limit=0.0,
    ),
    Check(
        text="token by token with a state equals the full pass, at block 1 and at block 3",
        where="[memmamba] Works when 4",
        measure=lambda: max(exact.resumes(SMALL), exact.resumes(TOKEN)),
        limit=1e-10,
    ),
    Check(
        text="the state does not grow over 100,000 tokens",
        where="[memmamba] Works when 4",
        measure=memory_pool.grows,
        limit=0.0,
    ),
    Check(
        text="what a token does to Mamba's state later stays below the product of its decays",
        where="[memmamba] Works when 5",
        measure=memory_pool.impulse,
        limit=1 + 1e-10,
    ),
    Check(
        text="below half that bound it does not stay (the check above can fail)",
        where="[memmamba] Works when 5",
        measure=lambda: memory_pool.impulse(shrink=0.5),
        limit=1.01,
        at_least=True,
    ),
    Check(
        text="the memory fidelity of a shift register that holds all tokens is 1",
        where="[memmamba] Works when 5",
        measure=lambda: abs(memory_pool.register_fidelity() - 1),
        limit=1e-6,
    ),
    Check(
        text="that of one that holds a third of them is below 0.5 (the check above can fail)",
        where="[memmamba] Works when 5",
        measure=lambda: memory_pool.register_fidelity(size=2),
        limit=0.5,
    ),
    Check(
        text="the score has a gradient though the choice has none",
        where="[memmamba] Works when 6",
        measure=memory_pool.score_gradient,
        limit=1e-5,
        at_least=True,
    ),
)


def small(keep: str = "priority") -> Stack:
    mixer = MemMamba(mixer=Mamba(state=4), pool=16, note_dim=16, block=8, keep=keep)
    return model(dim=32, depth=2, mixer=mixer)


TASK = FlaggedNotes(flagged=12, noise=52, test_more=(192,))
ARMS = {
    "method": small(),
    "baseline": model(dim=36, depth=2, mixer=Mamba(state=9)),
    "knockout": small("fifo"),
    "random": small("random"),
}

CLAIMS = (
    Claim(
        text="notes of flagged tokens outlive noise where a state of equal parameters, and pools filled otherwise, lose them",
        where="[memmamba] Works when 7",
        task=TASK,
        budget=Budget(steps=1500, lrs=(3e-3,)),
        notes="The sheet asks 40 points over a pool filled first in, first out, where it measured 0.29. On the calibration "
        "seed ours reaches 0.55 (0.09 with 192 more), a random one 0.53 (0.16), Mamba 0.23 (0.06) and the method 1.00 (1.00), "
        "so that 30 points are asked at 76 tokens and 40 with 192 more.",
        arms=ARMS,
        require=(
            above("method", 0.95),
            above("method", 0.95, on="with_192_more"),
            beats("method", "baseline", by=0.40),
            beats("method", "knockout", by=0.30),
            beats("method", "knockout", by=0.40, on="with_192_more"),
            beats("method", "random", by=0.30),
        ),
    ),
    Claim(
        text="at the best of three rates each, too, and more so when 192 more tokens of noise follow",
        where="[memmamba] Works when 7",
        task=TASK,
        budget=Budget(steps=1500, lrs=(1e-3, 3e-3, 1e-2)),
        arms={arm: ARMS[arm] for arm in ("method", "baseline", "knockout")},
        require=(
            above("method", 0.95),
            beats("method", "baseline", by=0.10),
            beats("method", "baseline", by=0.15, on="with_192_more"),
            beats("method", "knockout", by=0.10),
        ),
    ),
)

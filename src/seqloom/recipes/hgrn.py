"""HGRN: a gated linear recurrence whose memory is held open from below, further in every layer."""

from functools import partial

from seqloom.core import Budget, Check, Claim, Paper, above, beats
from seqloom.laws import exact
from seqloom.laws.exact import gated_recurrence
from seqloom.mixers import HGRN
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.sequence import language_model
from seqloom.parts import MLP, SwiGLU
from seqloom.tasks import ForgetHorizon, LongMemory

PAPER = Paper(
    slug="hgrn",
    number=96,
    title="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
    authors="Qin, Yang, Zhong",
    year=2023,
    arxiv="2311.04823",
)


def model(*, dim: int = 512, depth: int = 6, mixer: HGRN = HGRN(), mlp: SwiGLU | MLP = SwiGLU(), dropout: float = 0.0) -> Stack:
    """The paper's stack: pre-norm HGRU and gated linear units, no positional encoding."""
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=mlp, norm="layer", dropout=dropout),) * depth, norm="layer")


def wikitext(*, vocab: int = 50264) -> SequenceModel:
    """A language model at about the size of the paper's for WikiText-103, with tied embeddings."""
    return language_model(vocab=vocab, stack=model(dim=512, depth=6, dropout=0.1))


def long_range(*, dim: int = 512, depth: int = 6) -> Stack:
    """At the sizes of the paper's Long Range Arena models (cifar 512 x 6, imdb 128 x 4, listops 32 x 6): both directions."""
    return model(dim=dim, depth=depth, mixer=HGRN(direction="bidirectional"))


def simplified(*, dim: int = 1024, depth: int = 24) -> Stack:
    """The real recurrence without biases that flash-linear-attention has, with its way of summing the bounds."""
    return model(dim=dim, depth=depth, mixer=HGRN(recurrence="real", norm="rms", bias=False, lower_bounds="shifted"))


small = partial(model, dim=48, depth=4, mlp=MLP(hidden=96, activation="silu"))
ARMS = {
    "method": small(),
    "baseline": small(mixer=HGRN(lower_bounds="falling")),
    "knockout": small(mixer=HGRN(lower_bounds="none")),
}

CHECKS = (
    *(
        Check(
            text=f"token by token, in chunks and by doubling: all forms agree ({kind})",
            where="[hgrn] section 3.2",
            measure=partial(exact.forms_agree, HGRN(recurrence=kind), dim=16),
            limit=1e-10,
        )
        for kind in ("complex", "real")
    ),
    Check(
        text="the complex recurrence is a real one in a turning frame",
        where="[hgrn] section 3.2",
        measure=gated_recurrence.frame_turns,
        limit=1e-10,
    ),
    Check(
        text="bounds are 0 in the first layer, do not fall with depth, stay below 1, and no forget value is below its bound",
        where="[hgrn] section 3.3",
        measure=gated_recurrence.bounds_hold,
        limit=1e-12,
    ),
    Check(
        text="the same for bounds summed as flash-linear-attention does",
        where="[hgrn] section 3.3",
        measure=partial(gated_recurrence.bounds_hold, shift=1),
        limit=1e-12,
    ),
    Check(
        text="the two ways to sum them give different bounds from one matrix",
        where="[hgrn] section 3.3",
        measure=gated_recurrence.conventions_differ,
        limit=0.1,
        at_least=True,
    ),
    Check(
        text="no state exceeds the largest candidate so far",
        where="[hgrn] section 3.2",
        measure=gated_recurrence.exceeds_inputs,
        limit=1e-12,
    ),
    Check(
        text="without turning and imaginary input the complex recurrence is the real one",
        where="[hgrn] section 3.2",
        measure=gated_recurrence.real_is_complex,
        limit=1e-10,
    ),
    Check(
        text="the bound in log space is the bound, and a bound of 0 makes no NaN",
        where="[hgrn] section 3.3",
        measure=gated_recurrence.log_space_bound,
        limit=1e-12,
    ),
    Check(
        text="after n steps a write is kept at bound^n or more",
        where="[hgrn] section 3.3",
        measure=gated_recurrence.impulse_below_bound,
        limit=1e-12,
    ),
    Check(
        text="changing a token leaves earlier outputs alone",
        where="[hgrn] section 3.2",
        measure=lambda: exact.looks_ahead(HGRN(), dim=16),
        limit=1e-12,
    ),
    Check(
        text="a sequence cut anywhere and resumed equals one pass",
        where="[hgrn] section 3.2",
        measure=lambda: exact.resumes(HGRN(), dim=16),
        limit=1e-10,
    ),
)

CLAIMS = (
    Claim(
        text="untrained, the last of four layers keeps ten decades more of what it read 64 tokens ago than without bounds, and "
        "every layer keeps more than the one below",
        where="[hgrn] section 3.3",
        task=ForgetHorizon(),
        arms=ARMS,
        budget=Budget(steps=0),
        require=(
            beats("method", "knockout", by=10.0),
            beats("method", "baseline", by=10.0),
            above("method", 1.0, on="rise"),
        ),
        notes="Scores are log10 of the product of 64 forget values. Bounds that fall with depth end at 0.",
    ),
    Claim(
        text="rising bounds remember a token through noise where none, or falling ones, do not, and forget values rise with "
        "depth",
        where="[hgrn] section 4.2",
        task=LongMemory(length=32),
        control=LongMemory(length=4),
        control_arms=("knockout", "baseline"),
        budget=Budget(steps=1600),
        first_seed=200,
        arms=ARMS,
        require=(
            above("method", 0.95),
            beats("method", "knockout", by=0.40),
            beats("method", "baseline", by=0.10),
            above("method", 0.05, on="rise"),
        ),
        notes="Length 32 in place of the sheet's 48, which the method did not learn in 800 steps at 3e-3 or 1e-3 (calibration "
        "seed, projections at a standard deviation of 0.02; they start at a fan-in scale since). "
        "1,600 steps: with 800, one of the seeds 0, 17, 34 stayed at chance (0.93, 0.08, 1.00). These seeds are fresh.",
    ),
)

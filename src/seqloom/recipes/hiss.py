"""HiSS: a state space model inside short chunks of sensor samples, and one over the chunks."""

from functools import partial

from seqloom.core import Budget, Check, Claim, Paper, Spec, above, beats
from seqloom.laws.exact import hierarchy
from seqloom.mixers import S4D, Mamba
from seqloom.models import Block, Hierarchy, Stack
from seqloom.tasks import TextureSensor

PAPER = Paper(
    slug="hiss",
    number=6,
    title="Hierarchical State Space Models for Continuous Sequence-to-Sequence Modeling",
    authors="Bhirangi, Wang, Pattabiraman, Majidi, Gupta, Hellebrekers, Pinto",
    year=2024,
    arxiv="2402.10211",
)


def stack(mixer: Spec, *, dim: int, depth: int, norm: str = "layer", dropout: float = 0.0) -> Stack:
    """One level: a LayerNorm, the mixer, dropout and a residual sum; `depth` 0 leaves the norm alone."""
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=None, norm="layer", dropout=dropout),) * depth, norm=norm)


def model(
    low: Spec,
    high: Spec,
    *,
    dims: tuple[int, int] = (256, 128),
    depths: tuple[int, int] = (6, 6),
    norms: tuple[str, str] = ("none", "layer"),
    chunk: int = 10,
) -> Hierarchy:
    """The paper's layout: the last output of `low` on every chunk is a token of `high`. Its S4 stacks end without a norm, its
    Mamba stacks with one."""
    return Hierarchy(
        low=stack(low, dim=dims[0], depth=depths[0], norm=norms[0], dropout=0.1),
        high=stack(high, dim=dims[1], depth=depths[1], norm=norms[1], dropout=0.1),
        chunk=chunk,
    )


def marker_writing() -> Hierarchy:
    return model(S4D(), Mamba())


def ronin() -> Hierarchy:
    return model(S4D(), S4D(), norms=("none", "none"))


def total_capture() -> Hierarchy:
    return model(S4D(), Mamba(), depths=(6, 4))


def vector() -> Hierarchy:
    return model(Mamba(), Mamba(), dims=(32, 64), depths=(4, 4), norms=("layer", "layer"))


def flat(mixer: Spec, *, dim: int = 256, depth: int = 6, chunk: int = 10) -> Hierarchy:
    """The paper's flat baselines: one stack at the sensors' rate, read once a chunk. At its last sample here, so that a flat
    model has seen what a hierarchical one has; the paper reads it at the first."""
    low, high = stack(mixer, dim=dim, depth=depth, norm="none"), stack(mixer, dim=dim, depth=0)
    return Hierarchy(low=low, high=high, chunk=chunk, memory="sequence")


# Four layers of width 32 in every arm, about 19,200 parameters; one norm, behind the last of them.
small = partial(stack, S4D(state=32), dim=32)
below = partial(small, norm="none")
ARMS = {
    "method": Hierarchy(low=below(depth=2), high=small(depth=2)),
    "baseline": flat(S4D(state=32), dim=32, depth=4),
    "knockout": Hierarchy(low=below(depth=0), pool="mean", high=small(depth=4)),
    "no_high": Hierarchy(low=below(depth=4), high=small(depth=0)),
    # all that is linear in ten samples of twelve sensors; fewer poles pay for the wide map
    "stacked": Hierarchy(low=below(dim=12, depth=0), pool="all", high=stack(S4D(state=24), dim=32, depth=4)),
}

CHECKS = (
    *(
        Check(
            text=f"sample by sample, or in uneven pieces, equals one pass (pool {pool}, memory of a {memory})",
            where="[hiss] section 4",
            measure=partial(hierarchy.streams, pool=pool, memory=memory),
            limit=1e-10,
        )
        for pool, memory in (("last", "chunk"), ("mean", "chunk"), ("all", "chunk"), ("last", "sequence"))
    ),
    Check(
        text="the samples of a chunk move no earlier output",
        where="[hiss] section 4",
        measure=lambda: hierarchy.looks_ahead()[0],
        limit=1e-12,
    ),
    Check(
        text="and they do move that of their own chunk",
        where="[hiss] section 4",
        measure=lambda: hierarchy.looks_ahead()[1],
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="without a level above, permuted chunks give permuted outputs",
        where="[hiss] section 4",
        measure=hierarchy.chunks_are_independent,
        limit=1e-10,
    ),
    Check(
        text="where the lower level runs on they do not (the check above can fail)",
        where="[hiss] section 4",
        measure=partial(hierarchy.chunks_are_independent, memory="sequence"),
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="chunks of one sample, with nothing below, are the upper level alone",
        where="[hiss] section 4",
        measure=hierarchy.one_sample_chunks,
        limit=1e-10,
    ),
    Check(
        text="padding, NaN there, changes neither outputs nor the loss nor its gradients",
        where="[hiss] section 5",
        measure=hierarchy.padding,
        limit=1e-10,
    ),
    Check(
        text="a training step takes at most three quarters of the flat model's processor time",
        where="[hiss] section 4",
        measure=lambda: hierarchy.step_time(ARMS["method"], ARMS["baseline"]),
        limit=0.75,
    ),
)

CLAIMS = (
    Claim(
        text="reads velocity off fast, drifting sensors, where a level less, or a linear map of the chunk in place of the "
        "lower one, does not; as well as a flat model of the same size",
        where="[hiss] section 5",
        task=TextureSensor(),
        control=TextureSensor(coupling="additive"),
        budget=Budget(steps=500, lrs=(3e-3, 1e-2, 2e-2), batch=16),
        arms=ARMS,
        require=(
            above("method", 0.58),
            beats("method", "knockout", by=0.40),
            beats("method", "no_high", by=0.40),
            beats("method", "stacked", by=0.40),
            beats("method", "baseline", by=-0.03),
        ),
        notes="Scores are 1 - MSE / variance, with a variance of 0.60. The paper's 23 % below the best flat model is not "
        "claimed: on the calibration seed the flat model, which is read at a chunk's last sample here, is a little better. "
        "Control: where the texture adds to the signal, chunk means suffice.",
    ),
)

"""CausalRN: a relation network made causal, whose pairs are normalised before the exponential; it copies as attention does."""

from seqloom.core import Budget, Check, Claim, Paper, above, beats
from seqloom.laws import exact
from seqloom.laws.exact import relation
from seqloom.mixers import CausalRelation
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.heads import TokenHead
from seqloom.models.stems import TokenStem
from seqloom.tasks import Copy

PAPER = Paper(
    slug="causalrn",
    number=93,
    title="An All-MLP Sequence Modeling Architecture That Excels at Copying",
    authors="Cui, Yan, Muhawenayo, Kerner",
    year=2024,
    arxiv="2406.16168",
)


def model(*, dim: int = 192, depth: int = 12, mixer: CausalRelation = CausalRelation()) -> Stack:
    """The paper's stack: the mixer is the whole block, with neither attention nor a channel mixer beside it."""
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=None, norm="layer"),) * depth, norm="layer")


def copier(*, stack: Stack, symbols: int = 26, length: int) -> SequenceModel:
    """For the copy task: embeddings and learned positions N(0, 1), which end at 2 `length`, and a head of its own."""
    stem = TokenStem(vocab=symbols + 1, positions=2 * length, std=1.0)
    return SequenceModel(stem=stem, stack=stack, head=TokenHead(classes=symbols, tie=False))


def paper_copier(*, length: int = 64) -> SequenceModel:
    return copier(stack=model(), length=length)


def images() -> Stack:
    """The paper's stack for sequences of 256 image patches."""
    return model(dim=768, mixer=CausalRelation(hidden=3072))


LENGTH = 16
START = 32**-0.5  # of W_1 and W_2 at width 32, where the paper's 0.02 at width 192 would start too small


def small(mixer: CausalRelation) -> SequenceModel:
    return copier(stack=model(dim=32, depth=2, mixer=mixer), length=LENGTH)


LINEAR = CausalRelation(hidden=24, pre_norm="approx")

CHECKS = (
    Check(
        text="all pairs at once and tile by tile agree, gradients included",
        where="[causalrn] Method 2",
        measure=lambda: exact.forms_agree(CausalRelation(hidden=24), dim=16),
        limit=1e-10,
    ),
    Check(
        text="the linear variant token by token, in chunks and by doubling: all forms agree",
        where="[causalrn] Method 3",
        measure=lambda: exact.forms_agree(LINEAR, dim=16),
        limit=1e-10,
    ),
    Check(
        text="the linear variant's running sum is the sum over pairs",
        where="[causalrn] Method 3",
        measure=relation.sums_pairs,
        limit=1e-12,
    ),
    Check(
        text="the stable evaluation equals the naive one after the output norm, up to |a| = |b| = 20",
        where="[causalrn] Method 5",
        measure=relation.stable_is_naive,
        limit=1e-10,
    ),
    Check(
        text="at |a| = |b| = 800 the stable evaluation is finite throughout",
        where="[causalrn] Method 5",
        measure=lambda: relation.overflows("stable"),
        limit=0.0,
    ),
    Check(
        text="where the naive one overflows (the check above can fail)",
        where="[causalrn] Method 5",
        measure=lambda: relation.overflows("naive"),
        limit=0.1,
        at_least=True,
    ),
    Check(
        text="what j contributes to i is a product of two factors in the linear variant",
        where="[causalrn] Method 6",
        measure=lambda: relation.more_than_a_product("approx"),
        limit=1e-12,
    ),
    Check(
        text="and more than that where the pair is normalised: it depends on content",
        where="[causalrn] Method 6",
        measure=lambda: relation.more_than_a_product("exact"),
        limit=0.05,
        at_least=True,
    ),
    Check(
        text="changing a token leaves earlier outputs alone",
        where="[causalrn] Method 2",
        measure=lambda: max(exact.looks_ahead(spec, dim=16) for spec in (CausalRelation(hidden=24), LINEAR)),
        limit=1e-12,
    ),
    Check(
        text="the first output is that of its own pair",
        where="[causalrn] Method 2",
        measure=relation.first_token,
        limit=1e-12,
    ),
    Check(
        text="decoding from the cache, or from the running sum, equals the full pass",
        where="[causalrn] Forms",
        measure=lambda: max(exact.resumes(spec, dim=16) for spec in (CausalRelation(hidden=24), LINEAR)),
        limit=1e-10,
    ),
)

CLAIMS = (
    Claim(
        text="copies a string where the linear variant, whose pairs are not normalised together, cannot tell its places apart",
        where="[causalrn] section 4",
        task=Copy(length=LENGTH),
        control=Copy(length=4),
        budget=Budget(steps=1200, lrs=(1e-3, 3e-3, 6e-3)),
        arms={
            "method": small(CausalRelation(std=START)),
            "baseline": small(CausalRelation(std=START, activation="gelu")),
            "knockout": small(CausalRelation(std=START, pre_norm="approx")),
        },
        require=(above("method", 0.95), beats("method", "knockout", by=0.50), beats("method", "baseline", by=0.10)),
    ),
)

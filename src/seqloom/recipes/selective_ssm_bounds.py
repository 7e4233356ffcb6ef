"""Bounds on generalisation of selective state spaces: the sign of the spectral abscissa decides what the length costs."""

import math

from seqloom.core import Budget, Check, Claim, Paper, above, beats, below
from seqloom.laws import exact
from seqloom.laws.exact import bounds
from seqloom.mixers import S6
from seqloom.models import Block, Stack
from seqloom.tasks import InitialLoss, Majority

PAPER = Paper(
    slug="selective-ssm-bounds",
    number=53,
    title="Generalization Error Analysis for Selective State-Space Models Through the Lens of Attention",
    authors="Honarpisheh, Bozdag, Camps, Sznaier",
    year=2025,
    arxiv="2502.01473",
)


def model(*, dim: int = 4, abscissa: float = 0.0, learned: bool = False, state: int = 4) -> Stack:
    """One selective state space; its last output is read by a linear map. The inputs' norm is bounded by a norm in front, and
    the input is added to the output, as in every block here; the paper has the layer bare."""
    mixer = S6(state=state, abscissa=abscissa, transition="learned" if learned else "fixed")
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=None),), norm="none")


def size_majority() -> Stack:
    return model(dim=4)


def size_text() -> Stack:
    return model(dim=16)


CHECKS = (
    Check(
        text="token by token, in chunks and by doubling agree",
        where="[selective-ssm-bounds] section 2",
        measure=lambda: exact.forms_agree(S6(abscissa=-1.0, spread=0.5, std=0.1), dim=16, lengths=(1, 3, 50)),
        limit=1e-10,
    ),
    Check(
        text="the scan is its attention form: query W_C u, key W_B u, value u",
        where="[selective-ssm-bounds] section 3.1",
        measure=bounds.is_attention,
        limit=1e-10,
    ),
    Check(
        text="products of transitions stay below rho^t",
        where="[selective-ssm-bounds] section 3",
        measure=bounds.outgrows,
        limit=1e-9,
    ),
    Check(
        text="the closed form of the length factor is the sum",
        where="[selective-ssm-bounds] Theorem 3.3",
        measure=bounds.length_factor_errs,
        limit=1e-9,
    ),
    Check(
        text="s = -0.1: ten times the length moves the bound by less than 1 %",
        where="[selective-ssm-bounds] Theorem 3.3",
        measure=bounds.stable_bound_grows,
        limit=0.01,
    ),
    Check(
        text="s = 0: it does not (the check above can fail)",
        where="[selective-ssm-bounds] Theorem 3.3",
        measure=lambda: bounds.stable_bound_grows(abscissa=0.0),
        limit=1.0,
        at_least=True,
    ),
    Check(
        text="s = 0.1: the bound grows by log rho a token",
        where="[selective-ssm-bounds] Theorem 3.3",
        measure=bounds.unstable_bound_slope,
        limit=0.02,
    ),
    Check(
        text="s > 0: the lower bound is below the upper one where steps can reach 1",
        where="[selective-ssm-bounds] Theorem 4.1",
        measure=bounds.floor_over_ceiling,
        limit=1.0,
    ),
    Check(
        text="where they cannot, it is not (the check above can fail)",
        where="[selective-ssm-bounds] Theorem 4.1",
        measure=lambda: bounds.floor_over_ceiling(long_steps=False),
        limit=1.0,
        at_least=True,
    ),
)

# As the paper trains: 10 epochs of 1,000 rows in batches of 64, Adam, no clipping.
MAJORITY = Budget(steps=160, lrs=(3e-3, 1e-2, 3e-2), batch=64, warmup=0.0, betas=(0.9, 0.999), weight_decay=1e-5, clip=math.inf)

CLAIMS = (
    Claim(
        text="before training, the loss at 300 tokens is 10 powers of ten higher with s = 0.1 than with s = 0",
        where="[selective-ssm-bounds] section 5.1",
        task=InitialLoss(lengths=(10, 50, 300)),
        arms={"method": model(abscissa=0.0), "baseline": model(abscissa=-0.1), "knockout": model(abscissa=0.1)},
        budget=Budget(steps=0),
        seeds=20,
        require=(
            beats("knockout", "method", by=10.0, on="at_300_tokens"),
            below("method", 3.0, on="at_300_tokens"),
            below("baseline", 3.0, on="at_300_tokens"),
            below("knockout", 3.0, on="at_10_tokens"),
        ),
        notes="The mean of the logarithm; 20 seeds, since it depends on the steps that a seed starts with (10^0.4 to 10^52 "
        "at s = 0.1). These seeds were looked at before: the difference was 11.1 on the first 3, 10.9 on 10 and 13.9 on 20.",
    ),
    Claim(
        text="s = 0 learns majority at 50 tokens",
        where="[selective-ssm-bounds] section 5.2",
        task=Majority(length=50),
        arms={"method": model(abscissa=0.0)},
        budget=MAJORITY,
        seeds=6,
        require=(above("method", 0.80), below("method", 0.90)),
        notes="With the next claim: what is learnt from noisy rows does not depend on the length. The sheet "
        "asks for means within 0.08; a claim trains at one length, so both have to lie in a band of 0.1, set before any fit of "
        "the reported seeds with s = 0.",
    ),
    Claim(
        text="s = 0 learns majority at 300 tokens as well as at 50, and a growing state does not",
        where="[selective-ssm-bounds] sections 5.1 and 5.2",
        task=Majority(length=300),
        control=Majority(length=10),
        arms={"method": model(abscissa=0.0), "knockout": model(abscissa=0.1)},
        budget=MAJORITY,
        seeds=6,
        require=(
            above("method", 0.80),
            below("method", 0.90),
            below("knockout", 0.75),
            beats("method", "knockout", by=0.10),
        ),
        notes="s = 0.1 and the limit 0.75 are the paper's setting and its sheet's limit. Before this claim was fixed, s = 0.1 "
        "was tried at the rates 1e-2 and 3e-2: 0.49 on seed 1000, but 0.88 and 0.89 on the reported seeds 0 and 17, where "
        "small steps at the start leave a loss of 10^3.2 and 10^0.4. s = 0.5 was then written down in its place, never run, "
        "and taken back. On six seeds that are not reported, at a constant rate of 1e-2, s = 0.1 reached 0.53 on average here "
        "and 0.54 in the paper's bare layer (no norm, no residual sum, readout N(0, 1)). Six seeds, not three: they differ so.",
    ),
)

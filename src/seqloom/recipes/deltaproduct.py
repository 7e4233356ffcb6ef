"""DeltaProduct: several delta-rule steps a token, so that a transition can turn and permute the state."""

from seqloom.core import Budget, Check, Claim, Paper, above, beats
from seqloom.laws import exact
from seqloom.laws.exact import householder
from seqloom.mixers import DeltaProduct
from seqloom.models import Block, Stack
from seqloom.parts import SwiGLU
from seqloom.tasks import Parity, WordProblem

PAPER = Paper(
    slug="deltaproduct",
    number=59,
    title="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
    authors="Siems, Carstensen, Zela, Hutter, Pontil, Grazzi",
    year=2025,
    arxiv="2502.10297",
)


def model(*, dim: int = 768, depth: int = 12, mixer: DeltaProduct = DeltaProduct(heads=6, key_dim=128, value_dim=256)) -> Stack:
    """The paper's language model: pre-norm DeltaProduct mixers and SwiGLU, no positional encoding."""
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=SwiGLU()),) * depth)


def layer_defaults(*, dim: int = 2048, depth: int = 24, steps: int = 2) -> Stack:
    """The authors' layer at its defaults: 6 heads with keys of 256 and values of 512, two steps, gate and convolution."""
    return model(dim=dim, depth=depth, mixer=DeltaProduct(heads=6, key_dim=256, value_dim=512, steps=steps))


def tracker(*, dim: int = 64, steps: int = 2, neg_eigval: bool = True, heads: int = 4, head: int = 16) -> Stack:
    """One layer that has nothing but its transitions to keep a state with: no decay, no convolution, no channel mixer."""
    mixer = DeltaProduct(heads=heads, key_dim=head, value_dim=head, steps=steps, neg_eigval=neg_eigval, decay=False, conv=0)
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=None),))


SMALL = dict(heads=2, key_dim=12, value_dim=16)

CHECKS = (
    *(
        Check(
            text=f"recurrent, chunked and parallel forms agree: {steps} steps a token, {'a' if decay else 'no'} decay",
            where="[deltaproduct] section 4.1",
            measure=lambda steps=steps, decay=decay: exact.forms_agree(DeltaProduct(**SMALL, steps=steps, decay=decay)),
            limit=1e-10,
        )
        for steps, decay in ((2, True), (3, False), (4, True))
    ),
    Check(
        text="one step a token is DeltaNet",
        where="[deltaproduct] section 4",
        measure=lambda: householder.one_step_is_delta_net(decay=False),
        limit=1e-10,
    ),
    Check(
        text="one step a token, with decay, is gated DeltaNet",
        where="[deltaproduct] section 4",
        measure=lambda: householder.one_step_is_delta_net(decay=True),
        limit=1e-10,
    ),
    Check(
        text="a sequence cut anywhere and resumed, or decoded token by token, equals one pass",
        where="[deltaproduct] section 4.1",
        measure=lambda: exact.resumes(DeltaProduct(**SMALL, steps=3)),
        limit=1e-10,
    ),
    Check(
        text="a token with beta 0 in all steps leaves the state unchanged",
        where="[deltaproduct] section 4",
        measure=householder.still_token,
        limit=0.0,
    ),
    Check(
        text="transitions with unit keys and beta in [0, 2] have norm at most 1, however many steps",
        where="[deltaproduct] section 4, stability",
        measure=householder.transition_norm,
        limit=1 + 1e-9,
    ),
    Check(
        text="four reflections a token multiply out words of S5 over 4,096 tokens",
        where="[deltaproduct] Theorem 1",
        measure=householder.group_products,
        limit=1e-9,
    ),
    Check(
        text="three of the four do not (the check above can fail)",
        where="[deltaproduct] Theorem 1",
        measure=lambda: householder.group_products(steps=3),
        limit=0.5,
        at_least=True,
    ),
    Check(
        text="nor do the four in reverse order",
        where="[deltaproduct] section 4",
        measure=lambda: householder.group_products(last_first=True),
        limit=0.5,
        at_least=True,
    ),
    Check(
        text="no single step comes nearer than sqrt(3) to a cycle of three points",
        where="[deltaproduct] section 4.2",
        measure=lambda: householder.cycle_distance(1),
        limit=3**0.5 - 1e-6,
        at_least=True,
    ),
    Check(
        text="two steps reach it",
        where="[deltaproduct] section 4.2",
        measure=lambda: householder.cycle_distance(2),
        limit=1e-3,
    ),
)

CLAIMS = (
    Claim(
        text="one layer tracks the product of permutations of three points, four times past its training length, only with two "
        "steps a token and negative eigenvalues",
        where="[deltaproduct] section 5.1",
        task=WordProblem(group="S3", length=24, test_lengths=(96,)),
        control=Parity(length=24),
        control_arms=("baseline",),
        budget=Budget(steps=1000, lrs=(1e-3, 3e-3, 1e-2), batch=64),
        notes="Parity needs one reflection: there the baseline, one step a token, is not behind.",
        arms={
            "method": tracker(),
            "baseline": tracker(steps=1, heads=6, head=15),
            "knockout": tracker(neg_eigval=False),
        },
        require=(
            above("method", 0.95),
            above("method", 0.95, on="at_96_tokens"),
            beats("method", "baseline", by=0.35),
            beats("method", "baseline", by=0.45, on="at_96_tokens"),
            beats("method", "knockout", by=0.50),
            beats("method", "knockout", by=0.50, on="at_96_tokens"),
        ),
    ),
)

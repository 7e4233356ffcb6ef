"""LION: linear attention with decay, bidirectional by one mask, as masked attention, two recurrences or chunks."""

from seqloom.core import Budget, Check, Claim, Paper, above, beats
from seqloom.laws import exact
from seqloom.laws.exact import masks
from seqloom.mixers import Lion, SoftmaxAttention
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.heads import PooledHead, TokenHead
from seqloom.models.stems import SeriesStem, TokenStem
from seqloom.parts import MLP
from seqloom.tasks import DigitPatches

PAPER = Paper(
    slug="lion",
    number=41,
    title="Linear Attention for Efficient Bidirectional Sequence Modeling",
    authors="Afzal, Abad Rocamora, Candogan, Puigdemont, Tonin, Wu, Shoaran, Cevher",
    year=2025,
    arxiv="2502.16249",
)


def model(*, dim: int = 192, depth: int = 12, hidden: int | None = None,
          mixer: Lion | SoftmaxAttention = Lion(heads=3)) -> Stack:
    """The paper's encoder: pre-norm blocks of a ViT with LION in the place of attention, no positional embedding."""
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=MLP(hidden=hidden), norm="layer"),) * depth, norm="layer")


def vision(*, dim: int, heads: int, classes: int = 1000, patch: int = 16, image: int = 224,
           mask: str = "selective") -> SequenceModel:
    """An image classifier at one of the paper's sizes, its patches along two serpentine curves; the mean of the tokens is
    read, where the authors read a class token."""
    mixer = Lion(heads=heads, mask=mask, order="serpentine", columns=image // patch, bias=True)
    return SequenceModel(stem=SeriesStem(channels=3 * patch * patch), stack=model(dim=dim, mixer=mixer),
                         head=PooledHead(classes=classes))


def vision_tiny() -> SequenceModel:
    return vision(dim=192, heads=3)


def vision_small() -> SequenceModel:
    return vision(dim=384, heads=6)


def vision_base() -> SequenceModel:
    return vision(dim=768, heads=12)


def masked_language(*, vocab: int = 30522, mask: str = "selective") -> SequenceModel:
    """The paper's BERT-Large layout for masked language modelling: a LayerNorm over the heads, rows not divided."""
    stack = model(dim=1024, depth=24, mixer=Lion(heads=16, mask=mask, normaliser="layer", bias=True))
    return SequenceModel(stem=TokenStem(vocab=vocab), stack=stack, head=TokenHead(classes=vocab))


def small(mixer: Lion | SoftmaxAttention = Lion(heads=4)) -> Stack:
    return model(dim=48, depth=2, hidden=96, mixer=mixer)


CHECKS = (
    *(
        Check(
            text=f"mask {kind!r}, side {side!r}: matrix, two recurrences and chunks are masked attention, entry by entry",
            where="[lion] section 3",
            measure=lambda kind=kind, side=side: masks.is_masked(kind, side),
            limit=1e-10,
        )
        for kind, side in (("none", "key"), ("fixed", "key"), ("selective", "key"), ("selective", "query"))
    ),
    Check(
        text="they are not what the diagonal counted twice would give (the checks above can fail)",
        where="[lion] section 3",
        measure=lambda: masks.is_masked("selective", diagonal=2.0),
        limit=1e-3,
        at_least=True,
    ),
    *(
        Check(
            text=f"the layer's forms agree at lengths with a ragged last chunk, {kind}",
            where="[lion] section 3",
            measure=lambda kind=kind: exact.forms_agree(Lion(heads=2, mask=kind)),
            limit=1e-10,
        )
        for kind in ("none", "fixed", "selective")
    ),
    Check(
        text="the two conventions for S are each other's transpose",
        where="[lion] section 3",
        measure=masks.sides_mirror,
        limit=1e-12,
    ),
    Check(
        text="and not the same",
        where="[lion] section 3",
        measure=masks.sides_differ,
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="decays of 1 give LIT, equal decays give D",
        where="[lion] section 3",
        measure=masks.limits,
        limit=1e-10,
    ),
    *(
        Check(
            text=f"a reversed sequence gives the reversed output, {kind}",
            where="[lion] section 3",
            measure=lambda kind=kind: masks.mirrored(kind),
            limit=1e-10,
        )
        for kind in ("none", "fixed", "selective")
    ),
    Check(
        text="without a mask it does not know the order of tokens",
        where="[lion] section 3",
        measure=lambda: masks.permuted("none"),
        limit=1e-10,
    ),
    Check(
        text="with one it does",
        where="[lion] section 3",
        measure=lambda: masks.permuted("fixed"),
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="the weights of a row sum to 1",
        where="[lion] section 3",
        measure=lambda: masks.row_sums("selective"),
        limit=1e-5,
    ),
    Check(
        text="the serpentine variant is the mean of two masks along the rows and along the columns",
        where="[lion] section 4",
        measure=masks.serpentine,
        limit=1e-10,
    ),
)

CLAIMS = (
    Claim(
        text="without positions, decay alone tells the order of patches: both masks with decay beat the one without",
        where="[lion] section 4",
        task=DigitPatches(),
        budget=Budget(steps=500, batch=64, lrs=(2e-3, 4e-3, 1e-2)),
        arms={
            "method": small(Lion(heads=4, mask="selective")),
            "fixed": small(Lion(heads=4, mask="fixed")),
            "knockout": small(Lion(heads=4, mask="none")),
            "baseline": small(SoftmaxAttention(heads=4, direction="bidirectional", position="none")),
        },
        require=(
            above("method", 0.7),
            beats("method", "knockout", by=0.08),
            beats("fixed", "knockout", by=0.08),
            beats("baseline", "knockout", by=-0.06),
            beats("knockout", "baseline", by=-0.06),
        ),
        notes="The baseline, softmax attention without positions, is the control: it reads the same bag of patches as the "
        "knockout, and has to stay within 6 points of it.",
    ),
)

"""Hydra: a bidirectional state space model as a quasiseparable matrix, two scans read one token late and a free diagonal."""

from seqloom.core import Budget, Check, Claim, Paper, above, beats, below
from seqloom.laws import exact
from seqloom.laws.exact import quasiseparable
from seqloom.mixers import Hydra, LinearAttention, Mamba2
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.heads import PooledHead, TokenHead
from seqloom.models.stems import SeriesStem, TokenStem
from seqloom.parts import MLP
from seqloom.tasks import MatrixClass, MatrixFit, TwoSidedNeighbours

PAPER = Paper(
    slug="hydra",
    number=38,
    title="Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers",
    authors="Hwang, Lahoti, Dao, Gu",
    year=2024,
    arxiv="2407.09941",
)


def model(*, dim: int = 256, depth: int = 8, mixer: Hydra | LinearAttention | Mamba2 = Hydra()) -> Stack:
    """The paper's encoder for text: Hydra layers alone, no MLP and no positions; two replace one Transformer layer."""
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=None),) * depth)


def masked_language(*, vocab: int = 30522) -> SequenceModel:
    """The paper's BERT-sized model: 23 layers of width 768 ([hydra] section 5.1)."""
    return SequenceModel(stem=TokenStem(vocab=vocab), stack=model(dim=768, depth=23), head=TokenHead(classes=vocab))


def vision(*, classes: int = 1000, patch: int = 16) -> SequenceModel:
    """ViT-B with Hydra in the place of attention: 12 layers of width 768 over patches of `patch` x `patch` colours."""
    blocks = (Block(mixer=Hydra(), mlp=MLP(), norm="layer"),) * 12
    return SequenceModel(stem=SeriesStem(channels=3 * patch * patch), stack=Stack(dim=768, blocks=blocks, norm="layer"),
                         head=PooledHead(classes=classes))


def small() -> Stack:
    return model(dim=64, depth=4, mixer=Hydra(state=16, head_dim=16))


SMALL = dict(state=16, head_dim=16, conv=0)

CHECKS = (
    Check(
        text="matrix, chunked and step-by-step forms agree",
        where="[hydra] section 3",
        measure=lambda: exact.forms_agree(Hydra(state=8, head_dim=16), dim=32),
        limit=1e-10,
    ),
    *(
        Check(
            text=f"the {form} form is the quasiseparable matrix, entry by entry, times x",
            where="[hydra] section 3.1",
            measure=lambda form=form: quasiseparable.is_matrix(form),
            limit=1e-10,
        )
        for form in ("matrix", "chunked", "recurrent")
    ),
    Check(
        text="two scans added without the shift are another matrix (the checks above can fail)",
        where="[hydra] section 3.1",
        measure=lambda: quasiseparable.is_matrix("chunked", combine="add"),
        limit=0.1,
        at_least=True,
    ),
    Check(
        text="blocks strictly below or above the diagonal have rank at most N",
        where="[hydra] section 3.1",
        measure=quasiseparable.excess_rank,
        limit=1e-12,
    ),
    Check(
        text="a flipped input with the directions' parameters swapped gives the flipped output",
        where="[hydra] section 3.2",
        measure=quasiseparable.mirrored,
        limit=1e-10,
    ),
    Check(
        text="without the swap it does not (the check above can fail)",
        where="[hydra] section 3.2",
        measure=lambda: quasiseparable.mirrored(swap=False),
        limit=0.1,
        at_least=True,
    ),
    Check(
        text="with the backward scan silent it is a causal scan read one token late, plus the diagonal",
        where="[hydra] section 3.2",
        measure=quasiseparable.one_sided,
        limit=1e-10,
    ),
    Check(
        text="without writes the diagonal alone is left",
        where="[hydra] section 3.2",
        measure=quasiseparable.diagonal_alone,
        limit=1e-12,
    ),
    Check(
        text="the last token moves the first output",
        where="[hydra] section 3.2",
        measure=lambda: quasiseparable.last_moves_first(Hydra(state=8, head_dim=16)),
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="the shift and the convolution do not cross a boundary between samples",
        where="[hydra] section 3.2",
        measure=lambda: quasiseparable.across_boundary(Hydra(state=8, head_dim=16)),
        limit=1e-12,
    ),
    Check(
        text="ones with a zero diagonal are in the class",
        where="[hydra] section 3.1",
        measure=quasiseparable.all_ones,
        limit=0.0,
    ),
    Check(
        text="two added scans have 2 on that diagonal",
        where="[hydra] section 3.1",
        measure=lambda: quasiseparable.all_ones(combine="add"),
        limit=2.0,
        at_least=True,
    ),
)

CLAIMS = (
    Claim(
        text="quasiseparable matrices come near any other of their order where low-rank and causal ones cannot",
        where="[hydra] section 3.1",
        task=MatrixFit(),
        budget=Budget(steps=0),
        arms={
            "method": MatrixClass(order=2),
            "baseline": MatrixClass(kind="low_rank", order=4),
            "knockout": MatrixClass(kind="semiseparable", order=4),
            "added": MatrixClass(kind="added", order=2),
        },
        require=(above("method", 0.98), below("baseline", 0.94), below("knockout", 0.75)),
    ),
    Claim(
        text="one layer names the neighbours on both sides, where one causal scan and a low-rank mixer cannot",
        where="[hydra] section 4.1",
        task=TwoSidedNeighbours(test_lengths=(64,)),
        control=TwoSidedNeighbours(sides="before"),
        budget=Budget(steps=400),
        arms={
            "method": model(dim=32, depth=1, mixer=Hydra(**SMALL)),
            "baseline": model(dim=32, depth=1, mixer=LinearAttention(heads=4, key_dim=18, value_dim=16, feature="none",
                                                                    normaliser="none", direction="bidirectional")),
            "knockout": model(dim=32, depth=1, mixer=Mamba2(state=36, head_dim=16, conv=1, conv_bias=False)),
            "added": model(dim=32, depth=1, mixer=Hydra(**SMALL, combine="add")),
        },
        require=(above("method", 0.95), beats("method", "knockout", by=0.50), beats("method", "baseline", by=0.60)),
        notes="The knockout is one causal scan, its state widened to the same number of parameters. The added pair of scans "
        "is reported, not required: at this size it is not told apart reliably.",
    ),
)

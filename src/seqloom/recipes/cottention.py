"""Cottention: cosine similarity in the place of softmax, so that attention is linear, and a trained power of the length."""

from seqloom.core import Budget, Check, Claim, Paper, above, beats, below
from seqloom.laws import exact
from seqloom.laws.exact import cosine
from seqloom.mixers import LinearAttention, SoftmaxAttention
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.sequence import language_model
from seqloom.parts import MLP
from seqloom.tasks import GrowthOfSums, TopicBytes

PAPER = Paper(
    slug="cottention",
    number=30,
    title="Cottention: Linear Transformers With Cosine Attention",
    authors="Mongaras, Dohm, Larson",
    year=2024,
    arxiv="2409.18747",
)

COSINE = LinearAttention(heads=12, feature="cosine", normaliser="count")
BOTH_WAYS = LinearAttention(heads=12, feature="cosine", normaliser="count", direction="bidirectional")
ROTARY = LinearAttention(heads=16, feature="cosine", normaliser="count", position="rope")


def model(*, dim: int = 768, depth: int = 12, mixer: LinearAttention | SoftmaxAttention = COSINE) -> Stack:
    """A Transformer's blocks with cosine attention in the place of softmax."""
    return Stack(dim=dim, blocks=(Block(mixer=mixer, mlp=MLP(), norm="layer"),) * depth, norm="layer")


def bert_base(*, vocab: int = 30522, length: int = 512) -> SequenceModel:
    """The paper's encoder: BERT-base with learned positions."""
    spec = language_model(vocab=vocab, stack=model(mixer=BOTH_WAYS))
    return SequenceModel(stem=type(spec.stem)(vocab=vocab, positions=length), stack=spec.stack, head=spec.head)


def gpt_300m(*, vocab: int = 50432) -> SequenceModel:
    """The paper's smaller decoder: rotated queries and keys, 24 layers of width 1,024."""
    return language_model(vocab=vocab, stack=model(dim=1024, depth=24, mixer=ROTARY))


def gpt_1b2(*, vocab: int = 50432) -> SequenceModel:
    return language_model(vocab=vocab, stack=model(dim=2048, depth=24, mixer=ROTARY))


def linear(**settings: str) -> LinearAttention:
    return LinearAttention(heads=4, **{"feature": "cosine", "normaliser": "count", **settings})


def small(mixer: LinearAttention | SoftmaxAttention) -> Stack:
    return model(dim=64, depth=2, mixer=mixer)


CHECKS = (
    *(
        Check(
            text=f"all forms are the sums written term by term: {', '.join(settings.values()) or 'causal, query side'}",
            where="[cottention] section 3",
            measure=lambda settings=settings: cosine.is_sum(**settings),
            limit=1e-10,
        )
        for settings in (
            {},
            {"norm_side": "key"},
            {"direction": "bidirectional"},
            {"normaliser": "none"},
            {"normaliser": "mean"},
        )
    ),
    Check(
        text="a sequence cut anywhere and resumed equals one pass: the count is carried",
        where="[cottention] section 3.3",
        measure=lambda: exact.resumes(linear()),
        limit=1e-10,
    ),
    Check(
        text="changing a token leaves earlier outputs alone",
        where="[cottention] section 3.3",
        measure=cosine.looks_ahead,
        limit=1e-12,
    ),
    Check(
        text="scaling queries by 7 and keys by 0.01 changes nothing",
        where="[cottention] section 3.1",
        measure=cosine.rescaled,
        limit=1e-12,
    ),
    Check(
        text="negating queries negates the output",
        where="[cottention] section 3.1",
        measure=lambda: cosine.rescaled(queries=-1.0, keys=1.0),
        limit=1e-12,
    ),
    Check(
        text="without the unit norm, queries and keys 10 times as long give outputs 100 times as large",
        where="[cottention] section 3.1",
        measure=lambda: cosine.rescaled(queries=10.0, keys=10.0, feature="none"),
        limit=98.9,
        at_least=True,
    ),
    Check(
        text="outputs are no longer than the sum of |v| over n^e",
        where="[cottention] section 3.2",
        measure=cosine.largest,
        limit=1.0,
    ),
    Check(
        text="with e = 1 they are no longer than the longest value",
        where="[cottention] section 3.2",
        measure=lambda: cosine.largest("mean"),
        limit=1.0,
    ),
    Check(
        text="a gradient reaches the power of the length",
        where="[cottention] section 3.2",
        measure=cosine.trains_power,
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="pads at the right do not change a bidirectional output, NaN or not",
        where="[cottention] section 3.2",
        measure=cosine.padded,
        limit=1e-12,
    ),
    Check(
        text="zeros that nobody calls pads do: they are counted (the check above can fail)",
        where="[cottention] section 3.2",
        measure=lambda: cosine.padded(tell=False),
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="no tensor of a training step grows faster than the length (2,048 to 4,096 tokens)",
        where="[cottention] section 3.4",
        measure=cosine.growth,
        limit=2.3,
    ),
    Check(
        text="one of the form by T x T weights does (the check above can fail)",
        where="[cottention] section 3.4",
        measure=lambda: cosine.growth(tokens=256, form="parallel"),
        limit=3.9,
        at_least=True,
    ),
)

CLAIMS = (
    Claim(
        text="a power of the length keeps outputs of one size where bare sums grow, as theory says",
        where="[cottention] section 3.2",
        task=GrowthOfSums(),
        budget=Budget(steps=0),
        arms={"method": linear(), "knockout": linear(normaliser="none"), "baseline": linear(normaliser="mean")},
        require=(
            above("method", 0.94),
            above("knockout", 0.94),
            above("baseline", 0.94),
            above("method", 0.4, on="growth"),
            below("method", 1.0, on="growth"),
            above("knockout", 5.0, on="growth"),
        ),
        notes="The score is 1 less the deviation of the slope of log rms against log t from theory.",
    ),
    Claim(
        text="as a language model of bytes it stays within 0.6 bits of softmax attention",
        where="[cottention] section 4.2",
        task=TopicBytes(length=64),
        budget=Budget(steps=500),
        arms={
            "method": small(linear(position="rope")),
            "baseline": small(SoftmaxAttention(heads=4)),
            "knockout": small(linear(position="rope", normaliser="none")),
        },
        require=(above("method", 0.55), beats("method", "baseline", by=-0.075)),
        notes="0.6 bits are 30 % of what softmax attention needs at the sheet's size. The knockout, sums divided by nothing, "
        "is reported: a task of one length does not tell it apart. The claim above is the test of the method.",
    ),
)

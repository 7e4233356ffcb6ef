"""Native Hybrid Attention: slots for what has left a window and the window's exact keys and values, under one softmax."""

from seqloom.core import Budget, Check, Claim, Paper, above, beats, below
from seqloom.laws import exact
from seqloom.laws.exact import slots
from seqloom.mixers import GatedSlotAttention, NativeHybridAttention, SoftmaxAttention
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.sequence import language_model
from seqloom.parts import MLP, SwiGLU
from seqloom.tasks import LongLocalRecall, MemoryJoin, TwoMemoryRecall

PAPER = Paper(
    slug="native-hybrid-attention",
    number=116,
    title="Native Hybrid Attention for Efficient Sequence Modeling",
    authors="Du, Hu, Zhang, Sun, Cheng",
    year=2025,
    arxiv="2510.07019",
)


def model(*, dim: int = 256, windows: tuple[int, ...] = (64, 64, 64, 2048), heads: int = 4, slots: int = 64) -> Stack:
    """One layer a window, all with the same parameters: 0 is slots alone, the longest context or more is full attention."""
    return Stack(dim=dim, blocks=tuple(
        Block(mixer=NativeHybridAttention(heads=heads, slots=slots, window=window), mlp=SwiGLU()) for window in windows))


def language(*, dim: int, windows: tuple[int, ...], heads: int, vocab: int = 32000) -> SequenceModel:
    return language_model(vocab=vocab, stack=model(dim=dim, windows=windows, heads=heads))


def size_340m() -> SequenceModel:
    """Three full layers among 24 at the paper's 2,048 tokens."""
    return language(dim=1024, windows=((64,) * 7 + (2048,)) * 3, heads=8)


def size_1b3() -> SequenceModel:
    return language(dim=2048, windows=((64,) * 7 + (2048,)) * 3, heads=16)


def small(mixer: NativeHybridAttention | GatedSlotAttention | SoftmaxAttention, *, hidden: int = 128) -> Stack:
    """One layer of width 64; `hidden` makes the parameters equal."""
    return Stack(dim=64, blocks=(Block(mixer=mixer, mlp=MLP(hidden=hidden)),))


SMALL = dict(heads=2, kv_heads=1, key_dim=8, value_dim=12, slots=10)
ONE_HEAD = dict(heads=1, key_dim=32, value_dim=32)

CHECKS = (
    Check(
        text="a window of all tokens is softmax attention with the same weights",
        where="[native-hybrid-attention] Works when 1",
        measure=slots.wide_window_is_softmax,
        limit=1e-10,
    ),
    Check(
        text="empty slots that are not masked take their share (the check above can fail)",
        where="[native-hybrid-attention] Traps 1",
        measure=lambda: slots.wide_window_is_softmax(unwritten="sink"),
        limit=1e-3,
        at_least=True,
    ),
    Check(
        text="without a window it is gated slot attention with the same weights",
        where="[native-hybrid-attention] Works when 2",
        measure=slots.no_window_is_slots,
        limit=1e-10,
    ),
    Check(
        text="token by token with a ring, by chunks and by T x T weights: forms agree for windows of 0, 1, 3, 64, 65 and 130",
        where="[native-hybrid-attention] Works when 3",
        measure=lambda: max(exact.forms_agree(NativeHybridAttention(**SMALL, window=window), dim=16, lengths=(1, 3, 70, 130))
                            for window in (0, 1, 3, 64, 65, 130)),
        limit=1e-10,
    ),
    Check(
        text="a window one token longer is something else (the check above can fail)",
        where="[native-hybrid-attention] Traps 3",
        measure=slots.off_by_one,
        limit=1e-4,
        at_least=True,
    ),
    Check(
        text="decoding with slots and ring equals the full pass",
        where="[native-hybrid-attention] Works when 3",
        measure=lambda: max(exact.resumes(NativeHybridAttention(**SMALL, window=window), dim=16) for window in (0, 1, 5, 100)),
        limit=1e-10,
    ),
    Check(
        text="changing a token leaves earlier outputs alone",
        where="[native-hybrid-attention] Method 1",
        measure=lambda: exact.looks_ahead(NativeHybridAttention(**SMALL, window=5)),
        limit=1e-12,
    ),
    Check(
        text="every past token is in the window or in the slots, never in both, and weights sum to at most 1",
        where="[native-hybrid-attention] Works when 4",
        measure=slots.one_path,
        limit=1e-12,
    ),
    Check(
        text="another window changes no parameter",
        where="[native-hybrid-attention] Works when 5",
        measure=slots.window_changes_no_parameter,
        limit=0.0,
    ),
)

CLAIMS = (
    Claim(
        text="one softmax over slots and window reads what either holds; two softmaxes answer from the wrong one as well",
        where="[native-hybrid-attention] section 3.2",
        task=TwoMemoryRecall(slots=16, window=8),
        arms={"method": MemoryJoin(), "baseline": MemoryJoin(join="mean"), "knockout": MemoryJoin(join="sum")},
        budget=Budget(steps=0),
        require=(above("method", 0.95), below("baseline", 0.60), below("knockout", 0.60)),
        notes="The score is 1 - distance: at most 0.05 for the joint softmax and at least 0.40 for the two others.",
    ),
    Claim(
        text="recalls what was said long ago and just now, where a window of the same memory forgets and slots alone blend",
        where="[native-hybrid-attention] section 4",
        task=LongLocalRecall(),
        arms={
            "method": small(NativeHybridAttention(**ONE_HEAD, slots=16, window=8)),
            "baseline": small(SoftmaxAttention(heads=1, head_dim=32, window=24), hidden=136),
            "knockout": small(NativeHybridAttention(**ONE_HEAD, slots=24, window=0), hidden=124),
            "gated_slot": small(GatedSlotAttention(**ONE_HEAD, slots=24), hidden=124),
        },
        budget=Budget(steps=1500, lrs=(1e-3, 3e-3, 1e-2)),
        first_seed=200,
        require=(
            above("method", 0.95, on="long"),
            above("method", 0.95, on="local"),
            below("baseline", 0.15, on="long"),
            beats("method", "knockout", by=0.25, on="long"),
            beats("method", "gated_slot", by=0.25, on="long"),
        ),
        notes="All arms hold 24 keys and values; the knockout is the method without its window. Tried before, with first keys "
        "drawn from the same 64 as the others: nothing then tells a pair to keep from one to forget, and the method's long "
        "score was 0.06 and 0.07 at rates of 3e-3 and 1e-2 on the calibration seed. With 1,000 steps one "
        "of the seeds 0, 17, 34 was not there yet (1.00, 1.00, 0.72). These seeds are fresh.",
    ),
)

"""The main job on data that every machine has: a small hybrid on the standard library's source, beside honest baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seqloom.core import form_report
from seqloom.data import baselines
from seqloom.train import TrainConfig, TrainResult, evaluate, train, without

MODEL = "demo"  # of models.presets


@dataclass(frozen=True)
class Demo:
    """bits per byte on the held-out files: of the model, of the baselines, and of the model without each mixer kind."""

    result: TrainResult
    baselines: dict[str, float]
    ablated: dict[str, float]
    forms: dict[str, list[str]]

    @property
    def bits_per_byte(self) -> float:
        return self.result.score.bits_per_byte


def config(out: Path, minutes: float) -> TrainConfig:
    return TrainConfig(
        data="stdlib", model=MODEL, out=out, minutes=minutes, vocab=4096, context=128, batch=16, lr=6e-3, save_every=0
    )


def run(out: Path, *, minutes: float = 3.5, progress: bool = True, say: Callable[[str], None] = print) -> Demo:
    """Train, then score everything on the same held-out files. Raises what `train` raises."""
    settings = config(out, minutes)
    result = train(settings, progress=progress, say=say)
    say("scoring the baselines and the ablations ...")
    learnt, apart = result.corpus.text("train"), result.corpus.text("held")
    rivals = {
        "unigram bytes": baselines.unigram(learnt, apart),
        "trigram bytes, interpolated": baselines.trigram(learnt, apart),
        **baselines.compressors(apart),
    }
    kinds = dict.fromkeys(block.mixer.spec.name() for block in result.model.stack.blocks)
    ablated = {}
    for kind in kinds:
        with without(result.model, kind):
            ablated[kind] = evaluate(result.model, result.corpus, context=settings.context).bits_per_byte
    return Demo(result, rivals, ablated, form_report())

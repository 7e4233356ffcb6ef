"""`seqloom evaluate`: bits per byte of a trained model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from seqloom.cli.options import at_least, device_of, parse
from seqloom.core import BadInput


@dataclass
class EvaluateOptions:
    """Bits per byte of a model on files, or on the documents its training held out."""

    model: Path
    """Folder of a trained model."""
    data: str | None = None
    """A file, a folder, 'stdlib' or 'hf:NAME', scored whole; by default the run's own held-out documents."""
    column: str | None = None
    """Text column of a table."""
    context: int | None = None
    """Tokens of a window; the run's own, or 512."""
    device: str = "cpu"


def main(argv: list[str]) -> None:
    from seqloom import hub
    from seqloom.data import prepare
    from seqloom.train import evaluate
    from seqloom.train.loop import stored_corpus

    options = parse(EvaluateOptions, argv, verb="evaluate")
    at_least(1, context=options.context)
    device = device_of(options.device)
    model, tokenizer = hub.load(options.model)
    model.to(device)
    if tokenizer is None:
        raise BadInput(f"{options.model} has no tokenizer.json, so text cannot be read with it")
    if options.data is None:
        corpus, config = stored_corpus(options.model)
        score = evaluate(model, corpus, context=options.context or config.context)
    else:
        with tempfile.TemporaryDirectory() as folder:
            corpus = prepare(options.data, Path(folder), column=options.column, share=0.0, tokenizer=tokenizer)
            score = evaluate(model, corpus.scored_whole(), context=options.context or 512)
    print(f"{score.bits_per_byte:.4f} bits per byte, {score.loss:.4f} nats per token over {score.tokens:,} tokens")

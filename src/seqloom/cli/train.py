"""`seqloom train`: a model from your files by one command."""

from __future__ import annotations

from seqloom.cli.options import making, parse, stderr


def main(argv: list[str]) -> None:
    from seqloom.core import form_report
    from seqloom.train import TrainConfig, train

    config = parse(TrainConfig, argv, verb="train")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of writing one file
    with making(config.out):
        result = train(config, say=stderr)
    forms = "; ".join(f"{mixer} {', '.join(names)}" for mixer, names in form_report().items())
    print(f"trained in {result.seconds:.0f} s at {result.tokens_per_second:,.0f} tokens/s; forms: {forms}")
    if result.score is not None:
        print(f"held out: {result.score.bits_per_byte:.4f} bits per byte ({result.score.loss:.4f} nats per token)")
    print(f"saved in {result.out}; try: seqloom generate --model {result.out} --prompt ...")

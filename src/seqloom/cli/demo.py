"""`seqloom demo`: the main job, end to end, on data that every machine has."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from seqloom.cli.options import parse


@dataclass
class DemoOptions:
    """Train a small hybrid on the Python standard library's source, and compare it with honest baselines on held-out files."""

    out: Path = Path("runs/demo")
    """Folder of the run; an earlier demo there is replaced."""
    minutes: float = 3.5
    """Length of training."""
    prompt: str = "def read_lines(path):\n"
    """What the sample continues."""


def main(argv: list[str]) -> int:
    from seqloom.cli.generate import continuation
    from seqloom.study import demo

    options = parse(DemoOptions, argv, verb="demo")
    if (options.out / "run.json").exists():
        shutil.rmtree(options.out)
    found = demo.run(options.out, minutes=options.minutes)
    ours = found.bits_per_byte
    print(f"\nbits per byte on {found.result.corpus.held.documents} held-out files ({found.result.corpus.held.size:,} bytes)")
    for name, value in sorted({"this model": ours, **found.baselines}.items(), key=lambda item: -item[1]):
        print(f"  {name:<30}{value:7.3f}")
    print("without one kind of mixer (not retrained)")
    for name, value in found.ablated.items():
        print(f"  without {name:<22}{value:7.3f}  it earns {value - ours:.3f}")
    print("\na continuation")
    model, tokenizer = found.result.model.eval(), found.result.corpus.tokenizer
    words = continuation(model, tokenizer, options.prompt, tokens=80, temperature=0.7, top_p=0.95, seed=0)
    text = options.prompt + "".join(words)
    print("  " + text.replace("\n", "\n  "))
    print(f"\ntrained {found.result.seconds:.0f} s at {found.result.tokens_per_second:,.0f} tokens/s")
    print("forms: " + "; ".join(f"{mixer} {', '.join(names)}" for mixer, names in found.forms.items()))
    print(f"saved in {options.out}; try: seqloom generate --model {options.out} --prompt 'import '")
    beaten = all(ours < found.baselines[name] for name in ("gzip -9", "xz"))
    if not beaten:
        print("this machine was too slow for the model to beat gzip and xz in the time given; try --minutes 8")
    return 0 if beaten else 1

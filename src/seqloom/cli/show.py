"""`seqloom show NAME`: one mixer or paper."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro

from seqloom.cli.options import at_least, parse
from seqloom.core import BadInput, near


@dataclass
class ShowOptions:
    """Show a mixer (equation, source, forms, settings, parameters, state, cost) or a paper (claims, verdict)."""

    name: Annotated[str, tyro.conf.Positional]
    """A mixer of `seqloom list`, or a paper of `seqloom list papers`."""
    dim: int = 256
    """Model width at which parameters, state and cost are counted."""


def main(argv: list[str]) -> None:
    from seqloom.mixers import MIXERS
    from seqloom.recipes import recipe, slugs

    options = parse(ShowOptions, argv, verb="show")
    at_least(1, dim=options.dim)
    if options.name in MIXERS:
        show_mixer(options.name, options.dim)
    elif options.name in slugs():
        show_paper(recipe(options.name))
    else:
        raise BadInput(f"nothing is called {options.name!r}; {near(options.name, [*MIXERS, *slugs()])}")


def show_mixer(name: str, dim: int) -> None:
    from seqloom.core import BuildContext, runnable
    from seqloom.models.presets import mixer_for
    from seqloom.study.fit import count_parameters

    spec = mixer_for(name, dim)
    layer = spec.build(BuildContext(dim=dim))
    print(f"{name}: {type(spec).__name__}")
    print(f"  equation    {spec.equation}")
    print(f"  source      [{spec.source}]")
    print(f"  forms       {', '.join(spec.forms)} (here: {', '.join(runnable(spec.forms, 'cpu'))})")
    print("  settings    " + ", ".join(f"{field.name}={getattr(spec, field.name)!r}" for field in dataclasses.fields(spec)))
    print(f"  parameters  {count_parameters(layer):,} at width {dim}")
    if spec.streams:
        sizes = ", ".join(f"{layer.state_bytes(tokens):,} at {tokens:,}" for tokens in (512, 8192))
        print(f"  state       {sizes} tokens (bytes per sequence{', constant' if spec.constant_state else ''})")
    else:
        print("  state       none: it sees whole sequences")
    cost = ", ".join(f"{_operations(layer, dim, tokens):,.0f} at {tokens:,}" for tokens in (512, 2048))
    print(f"  cost        {cost} tokens (matrix-product operations per token, forward)")
    for law, reason in spec.lacks.items():
        print(f"  lacks       {law}: {reason}")


def _operations(layer: object, dim: int, tokens: int) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, tokens, dim))
    return counter.get_total_flops() / tokens


def show_paper(recipe: object) -> None:
    paper = recipe.PAPER
    print(f"{paper.number} {paper.slug}: {paper.title}")
    for check in getattr(recipe, "CHECKS", ()):
        print(f"  check  {check.text} ({'>=' if check.at_least else '<='} {check.limit:g}; {check.where})")
    for claim in recipe.CLAIMS:
        print(f"  claim  {claim.text} ({claim.where})")
        for need in claim.require:
            print(f"         {need}")

"""`seqloom check`: the laws over the mixers, and the checks and claims of papers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from seqloom.cli.options import parse, stderr
from seqloom.core import BadInput, near

EVIDENCE = Path("evidence")


@dataclass
class CheckOptions:
    """Check mixers against the laws, or papers against their claims. Without names: the laws of every mixer."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Mixers and papers (see `seqloom list` and `seqloom list papers`)."""
    claims: bool = True
    """Run a paper's claims too, which train models; without it the exactness checks only."""
    jobs: int = 1
    """Processes that run laws and claims side by side, one thread each."""
    out: Path | None = None
    """Folder for evidence, <paper>.json and laws-<device>.json. Without it results are printed only."""
    pages: Path | None = None
    """Folder for the pages made of the results: laws.md, with the results kept in --out (or evidence/) of devices that are not
    here, and papers.md from the evidence kept there."""
    device: str = "cpu"
    """Where the laws run."""


def main(argv: list[str]) -> int:
    from seqloom.mixers import MIXERS
    from seqloom.recipes import slugs

    options = parse(CheckOptions, argv, verb="check")
    papers = slugs()
    unknown = [name for name in options.names if name not in MIXERS and name not in papers]
    if unknown:
        raise BadInput(f"nothing is called {unknown[0]!r}; {near(unknown[0], [*MIXERS, *papers])}")
    # a name may be both: `mamba` is a mixer and a paper; then both are checked
    mixers = [name for name in MIXERS if name in options.names] or (list(MIXERS) if not options.names else [])
    fine = True
    if mixers:
        fine &= check_laws(mixers, options)
    for slug in papers:
        if slug in options.names:
            fine &= check_paper(slug, options)
    if options.pages is not None:
        write_papers(options)
    return 0 if fine else 1


def check_laws(mixers: list[str], options: CheckOptions) -> bool:
    from seqloom import laws

    results = laws.run_laws(mixers, device=options.device, jobs=options.jobs)
    print(laws.summary(results))
    if options.out is not None:
        stderr(f"wrote {laws.keep(results, options.out)}")
    if options.pages is not None:
        options.pages.mkdir(parents=True, exist_ok=True)
        laws.write_table(results, options.pages / "laws.md", others=laws.kept(options.out or EVIDENCE))
    return not any(result.failed for result in results)


def check_paper(slug: str, options: CheckOptions) -> bool:
    from seqloom.recipes import recipe
    from seqloom.study import evidence

    stderr(f"{slug}: checks{' and claims' if options.claims else ''} ...")
    found = evidence.check_recipe(recipe(slug), claims=options.claims, jobs=options.jobs)
    for check in found["checks"]:
        found_value = f"{check['value']:.3g} {check['relation']} {check['limit']:g}"
        print(f"  {'holds' if check['holds'] else 'FAILS'}  {check['text']}: {found_value}")
    for claim in found["claims"]:
        print(f"  {'holds' if claim['holds'] else 'FAILS'}  {claim['text']} ({claim['seconds']:.0f} s)")
        for arm, means in claim["means"].items():
            runs = " ".join(f"{scores['score']:.3f}" for scores in claim["scores"][arm])
            shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            print(f"         {arm:<10} {shown}  (seeds {runs}; rate {claim['lrs'][arm]:g})")
        for text, holds in claim["requirements"].items():
            print(f"         {'yes' if holds else 'NO '}  {text}")
    print(f"{slug}: {found['verdict']} in {found['seconds']:.0f} s")
    if options.out is not None:
        stderr(f"wrote {evidence.write(found, options.out)}")
    return all(check["holds"] for check in found["checks"]) and all(claim["holds"] for claim in found["claims"])


def write_papers(options: CheckOptions) -> None:
    from seqloom.recipes import index, slugs
    from seqloom.study import evidence

    page = evidence.papers_page(evidence.rows(index(), options.out or EVIDENCE, slugs()))
    (options.pages / "papers.md").write_text(page)

"""docs/laws.md: mixer by law by device, and the time of each form."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from seqloom.laws import observe
from seqloom.laws.cases import WIDTH, build, cases, draw
from seqloom.laws.law import LawResult
from seqloom.laws.suite import LAWS

DEVICES = {"cpu": "CPU", "cuda": "CUDA", "mps": "Apple MPS", "windows": "Windows"}
TOKENS = 512


def form_times(mixers: Iterable[str] | None = None, device: str = "cpu", tokens: int = TOKENS) -> dict[tuple[str, str], float]:
    """Milliseconds of one forward and backward pass [2, T, 32] in float32, by (case, form): median of 3 after a warm-up."""
    times = {}
    for case in cases(mixers):
        layer = build(case, dtype=torch.float32, device=device)
        x = draw(2, tokens, WIDTH, name="time", dtype=torch.float32, device=device).requires_grad_()
        for name in case.forms(device):
            with observe.form(name):
                times[case.name, name] = statistics.median([_once(layer, x) for _ in range(4)][1:])
    return times


def _once(layer: torch.nn.Module, x: torch.Tensor) -> float:
    wait = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    layer(x).y.sum().backward()
    wait()
    return 1000 * (time.perf_counter() - began)


def device_of(result: LawResult) -> str:
    """The column a result belongs to: its device, or Windows for a CPU run there."""
    kind = result.device.split(":")[0]
    return "windows" if result.system == "Windows" and kind == "cpu" else kind


def table(results: Iterable[LawResult], times: Mapping[str, Mapping[tuple[str, str], float]] | None = None) -> str:
    """The results as markdown. `times` gives form times by device; None leaves them out."""
    results = list(results)
    found = {key: [result for result in results if device_of(result) == key] for key in DEVICES}
    lines = [
        "# Laws", "",
        "Written by `seqloom check`. Every law runs on every example of every mixer, values and gradients, on perturbed "
        "parameters at width 32, in float64 unless it says otherwise.", "",
        *_summary(found),
    ]
    for key, rows in found.items():
        if rows:
            lines += ["", f"## {DEVICES[key]}", "", *_grid(rows), *_notes(rows)]
            if times and key in times:
                lines += ["", *_times(times[key])]
    lines += ["", "## What each law says", ""]
    lines += [f"- **{name.replace('_', ' ')}**: {law.text}." for name, law in LAWS.items()]
    return "\n".join(lines) + "\n"


def write_table(results: Iterable[LawResult], path: str | Path, *, others: Iterable[LawResult] = (),
                measure: bool = True) -> None:
    """Write the table of `results` to `path`, with form times measured now on their devices unless `measure` is False.

    others: results kept from earlier runs, shown for the devices that `results` do not cover.
    """
    results = list(results)
    times, here = {}, dict.fromkeys(map(device_of, results))
    if measure:
        for key in here:
            mixers = dict.fromkeys(result.mixer for result in results if device_of(result) == key)
            times[key] = form_times(mixers, "cpu" if key == "windows" else key)
    text = table([*results, *(result for result in others if device_of(result) not in here)], times)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def keep(results: Iterable[LawResult], folder: str | Path) -> Path:
    """Store results of one device as laws-<device>.json in `folder`, for a page made where that device is not."""
    results = list(results)
    path = Path(folder) / f"laws-{device_of(results[0])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps({name: value for name, value in asdict(result).items() if value not in ("", None)})
                      for result in results)
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    return path


def kept(folder: str | Path) -> list[LawResult]:
    """What `keep` stored in `folder`, of all devices."""
    return [LawResult(**{"example": "", **row}) for path in sorted(Path(folder).glob("laws-*.json"))
            for row in json.loads(path.read_text(encoding="utf-8"))]


def summary(results: Iterable[LawResult]) -> str:
    """For the terminal: one line per case with what holds, what does not apply and why, and every failure in full."""
    lines = []
    by_case: dict[str, list[LawResult]] = {}
    for result in results:
        by_case.setdefault(result.case, []).append(result)
    width = max(map(len, by_case), default=0)
    for name, rows in by_case.items():
        count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("pass", "fail", "lacks", "untested")}
        said = f"{count['pass']} laws hold" + (f", {count['fail']} FAIL" if count["fail"] else "")
        out = [row for row in rows if row.verdict in ("lacks", "untested")]
        said += "".join(f"; {row.verdict} {row.law}: {row.reason}" for row in out)
        lines.append(f"{name:<{width}}  {said}  ({sum(row.seconds for row in rows):.1f} s)")
        lines += [f"{'':<{width}}  FAILS {row.law}: {row.reason}" for row in rows if row.failed]
    rows = [row for rows in by_case.values() for row in rows]
    apply = [row for row in rows if row.verdict != "not applicable"]
    lines.append(f"{sum(row.verdict == 'pass' for row in rows)} of {len(apply)} hold, on {len(by_case)} examples of "
                 f"{len({row.mixer for row in rows})} mixers; {len(rows) - len(apply)} do not apply")
    return "\n".join(lines)


def _summary(found: Mapping[str, list[LawResult]]) -> list[str]:
    """Mixer by device: how many laws hold over all of a mixer's examples."""
    mixers = dict.fromkeys(result.mixer for rows in found.values() for result in rows)
    lines = [f"| mixer | {' | '.join(DEVICES.values())} |", f"|---|{'---|' * len(DEVICES)}"]
    for mixer in mixers:
        cells = []
        for rows in found.values():
            mine = [row for row in rows if row.mixer == mixer]
            ran = [row for row in mine if row.verdict in ("pass", "fail")]
            passed = sum(row.verdict == "pass" for row in ran)
            cells.append("untested" if not ran else f"{passed} of {len(ran)}" + ("" if passed == len(ran) else " **fails**"))
        lines.append(f"| `{mixer}` | {' | '.join(cells)} |")
    return lines


def _grid(rows: list[LawResult]) -> list[str]:
    """Law by mixer: over a mixer's examples, the worst verdict."""
    mixers, laws = dict.fromkeys(row.mixer for row in rows), dict.fromkeys(row.law for row in rows)
    lines = [f"| law | {' | '.join(f'`{mixer}`' for mixer in mixers)} |", f"|---|{'---|' * len(mixers)}"]
    for law in laws:
        cells = [_cell([row for row in rows if row.law == law and row.mixer == mixer]) for mixer in mixers]
        lines.append(f"| {law.replace('_', ' ')} | {' | '.join(cells)} |")
    shown = "yes: holds in every example that it applies to; –: does not apply; lacks and untested: see below"
    return [*lines, "", f"{shown}."]


def _cell(rows: list[LawResult]) -> str:
    verdicts = [row.verdict for row in rows]
    if "fail" in verdicts:
        worst = max((row for row in rows if row.verdict == "fail"), key=lambda row: row.value or 0.0)
        return "**no**" + (f" {worst.value:.1g}" if worst.value is not None else "")
    for verdict, shown in (("lacks", "lacks"), ("untested", "untested")):
        if verdict in verdicts:
            return f"yes, {shown} in {verdicts.count(verdict)}" if "pass" in verdicts else shown
    return "yes" if "pass" in verdicts else "–"


def _notes(rows: list[LawResult]) -> list[str]:
    notes: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.verdict in ("fail", "lacks", "untested"):
            notes.setdefault((row.verdict, row.law, row.reason), []).append(row.case)
    if not notes:
        return []
    return ["", *(f"- {verdict}, {law.replace('_', ' ')}, {', '.join(names)}: {reason}"
                  for (verdict, law, reason), names in notes.items())]


def _times(times: Mapping[tuple[str, str], float]) -> list[str]:
    names = list(dict.fromkeys(name for _, name in times))
    lines = [f"Time of a forward and backward pass, [2, {TOKENS}, {WIDTH}] in float32, milliseconds:", "",
             f"| case | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for case in dict.fromkeys(case for case, _ in times):
        cells = [f"{times[case, name]:.1f}" if (case, name) in times else "–" for name in names]
        lines.append(f"| `{case}` | {' | '.join(cells)} |")
    return lines

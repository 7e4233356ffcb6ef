"""What a law is: a named function that measures a case, and what comes of running one."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from seqloom.laws.cases import Case

Verdict = Literal["pass", "fail", "not applicable", "lacks", "untested"]


class Measure(NamedTuple):
    """One number a law measured: it must not exceed `limit`, or must reach it if `at_least`. NaN never holds."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def strain(self) -> float:
        """How near to the limit: above 1 is broken. Used to pick the number that a result shows."""
        if self.value != self.value:
            return float("inf")
        if self.at_least:
            return self.limit / self.value if self.value > 0 else float("inf")
        return self.value / self.limit if self.limit else (float("inf") if self.value > 0 else 0.0)

    def __str__(self) -> str:
        return f"{self.what}: {self.value:.3g} {'>=' if self.at_least else '<='} {self.limit:.3g}"


class Untested(Exception):
    """Raised by a law that cannot run on this device or build, with the reason."""


@dataclass(frozen=True)
class Law:
    """A property every mixer must have. `needs(case)` is the reason why it does not apply, or None.

    The name is what `Spec.lacks` and docs/laws.md use; the text is the first line of the function's docstring.
    """

    function: Callable[[Case, str], Iterator[Measure]]
    needs: Callable[[Case], str | None] = lambda case: None

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def text(self) -> str:
        return (self.function.__doc__ or "").strip().splitlines()[0].rstrip(".")


@dataclass(frozen=True)
class LawResult:
    """What came of one law on one case: the worst number (nearest its limit or past it), or the reason for having none."""

    mixer: str
    example: str
    law: str
    verdict: Verdict
    value: float | None = None
    limit: float | None = None
    what: str = ""
    reason: str = ""
    device: str = "cpu"
    system: str = ""
    seconds: float = 0.0

    @property
    def case(self) -> str:
        return f"{self.mixer}-{self.example}" if self.example else self.mixer

    @property
    def failed(self) -> bool:
        return self.verdict == "fail"

    def __str__(self) -> str:
        shown = f" ({self.what}: {self.value:.3g}, limit {self.limit:.3g})" if self.value is not None else ""
        return f"{self.case}, {self.law}, {self.device}: {self.verdict}{shown}{': ' + self.reason if self.reason else ''}"


def apply(law: Law, case: Case, device: str = "cpu", *, despite_lack: bool = False) -> LawResult:
    """Run one law on one case. An exception inside is a failure with its message; nothing is skipped in silence.

    `despite_lack` runs it even where the spec says it lacks it, to see whether that still holds.
    """
    began = time.perf_counter()
    done = lambda verdict, **rest: LawResult(  # noqa: E731
        case.mixer, case.example, law.name, verdict, device=device, system=platform.system(),
        seconds=time.perf_counter() - began, **rest,
    )
    if (reason := law.needs(case)) is not None:
        return done("not applicable", reason=reason)
    if law.name in case.spec.lacks and not despite_lack:
        return done("lacks", reason=case.spec.lacks[law.name])
    try:
        measures = list(law.function(case, device))
    except Untested as reason:
        return done("untested", reason=str(reason))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
        return done("fail", reason=f"{type(error).__name__} at {place}: {str(error).strip() or 'no message'}"[:600])
    if not measures:
        return done("fail", reason="the law measured nothing")
    worst = max(measures, key=lambda measure: measure.strain)
    broken = [measure for measure in measures if not measure.holds]
    return done(
        "fail" if broken else "pass", value=float(worst.value), limit=float(worst.limit), what=worst.what,
        reason="; ".join(map(str, broken[:4])) + (f" and {len(broken) - 4} more" if len(broken) > 4 else ""),
    )


# Why a law may not apply: declared properties of the spec ----------------------------------------------------------

def streams(case: Case) -> str | None:
    return None if case.spec.streams else "it takes no state"


def causal(case: Case) -> str | None:
    return None if case.spec.causal else "it is not causal"


def constant(case: Case) -> str | None:
    return streams(case) or (None if case.spec.constant_state else "its state grows with the length")

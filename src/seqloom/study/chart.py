"""A scatter plot as an SVG file, written by hand: labelled points, decimal or logarithmic axes, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

LETTER, LINE = 6.3, 13  # what a label's character and line take at 11 px, roughly

STYLE = """
.back{fill:#ffffff}.frame{stroke:#c9ced6;fill:none}.grid{stroke:#e6e8ec}.text{fill:#22272e}.quiet{fill:#667080}
.still{fill:#2563eb;stroke:#2563eb}.grows{fill:#c2410c;stroke:#c2410c}.level{stroke:#667080;stroke-dasharray:4 4}
text{font:11px system-ui,sans-serif}.title{font-size:13px;font-weight:600}.trail{stroke-dasharray:2 4;opacity:.6}
@media (prefers-color-scheme:dark){.back{fill:#14181f}.frame{stroke:#4a525e}.grid{stroke:#262c36}.text{fill:#e6e9ee}
.quiet,.level{fill:#9aa4b2;stroke:#9aa4b2}.quiet{stroke:none}.still{fill:#7aa7ff;stroke:#7aa7ff}.grows{fill:#ff9a5c;stroke:#ff9a5c}}
"""


@dataclass(frozen=True)
class Point:
    """label at (x, mean of ys); ys are drawn faintly. `later`: where x will be, drawn hollow (a state that grows)."""

    label: str
    x: float
    ys: tuple[float, ...]
    grows: bool = False
    later: float | None = None

    @property
    def y(self) -> float:
        return sum(self.ys) / len(self.ys)


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `level` is a dashed line with its name, such as chance."""

    points: Sequence[Point]
    x: str
    y: str
    log: bool = True
    binary: bool = False          # marks of the x axis at powers of two and in KiB
    level: tuple[float, str] | None = None


def scatter(panels: Sequence[Panel], *, title: str, width: int = 560, height: int = 400) -> str:
    """The panels side by side as one SVG document. Raises: ValueError where there is nothing to draw, or a log of nothing."""
    if not panels or not all(panel.points for panel in panels):
        raise ValueError("a chart needs at least one panel, and every panel at least one point")
    total = width * len(panels)
    body = "".join(_panel(panel, i * width, width, height) for i, panel in enumerate(panels))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height + 26}" role="img" '
            f'aria-label="{escape(title, {chr(34): "&quot;"})}"><style>{STYLE}</style>'
            f'<rect class="back" width="100%" height="100%"/><text class="text title" x="16" y="20">{escape(title)}</text>'
            f'<g transform="translate(0,26)">{body}</g></svg>\n')


def _panel(panel: Panel, left: int, width: int, height: int) -> str:
    x0, x1, y0, y1 = left + 58, left + width - 18, height - 44, 10
    xs = [x for point in panel.points for x in (point.x, point.later) if x is not None]
    if panel.log and min(xs) <= 0:
        raise ValueError(f"a logarithmic axis takes positive values, and {panel.x!r} has {min(xs)}")
    ys = [y for point in panel.points for y in point.ys] + ([panel.level[0]] if panel.level else [])
    warp = (lambda value: math.log2(value)) if panel.log else (lambda value: value)
    low, high = warp(min(xs)), warp(max(xs))
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    under, over = min(ys), max(ys)
    pad = 0.07 * (over - under) or 0.05
    under, over = under - pad, over + pad
    px = lambda value: x0 + (warp(value) - low) / (high - low) * (x1 - x0)  # noqa: E731
    py = lambda value: y0 - (value - under) / (over - under) * (y0 - y1)  # noqa: E731
    out = []
    for value in _marks(low, high, panel):
        out.append(f'<line class="grid" x1="{px(value):.1f}" x2="{px(value):.1f}" y1="{y0}" y2="{y1}"/>'
                   f'<text class="quiet" x="{px(value):.1f}" y="{y0 + 16}" text-anchor="middle">'
                   f'{_bytes(value) if panel.binary else f"{value:g}"}</text>')
    for value in _even(under, over):
        out.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>'
                   f'<text class="quiet" x="{x0 - 8}" y="{py(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    out.append(f'<rect class="frame" x="{x0}" y="{y1}" width="{x1 - x0}" height="{y0 - y1}"/>'
               f'<text class="text" x="{(x0 + x1) / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(panel.x)}</text>'
               f'<text class="text" transform="translate({left + 16},{(y0 + y1) / 2:.0f}) rotate(-90)" text-anchor="middle">'
               f"{escape(panel.y)}</text>")
    taken = [(px(p.x) - 5, py(p.y) - 5, px(p.x) + 5, py(p.y) + 5) for p in panel.points]
    if panel.level is not None:
        at, name = panel.level
        out.append(f'<line class="level" x1="{x0}" x2="{x1}" y1="{py(at):.1f}" y2="{py(at):.1f}"/>'
                   f'<text class="quiet" x="{x1 - 4}" y="{py(at) - 4:.1f}" text-anchor="end">{escape(name)}</text>')
        taken.append((x1 - 4 - LETTER * len(name), py(at) - LINE, x1, py(at)))
    for point in panel.points:
        kind, x, y = "grows" if point.grows else "still", px(point.x), py(point.y)
        if point.later is not None:
            out.append(f'<line class="{kind} trail" x1="{x:.1f}" x2="{px(point.later):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
                       f'<circle class="{kind}" fill-opacity="0" cx="{px(point.later):.1f}" cy="{y:.1f}" r="4"/>')
        out += [f'<circle class="{kind}" opacity=".35" cx="{x:.1f}" cy="{py(each):.1f}" r="2"/>' for each in point.ys]
        out.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(point.label)}: '
                   f"{point.y:.3g} at {point.x:,.4g}</title></circle>")
    for point in sorted(panel.points, key=lambda point: px(point.x)):
        out.append(_label(point.label, px(point.x), py(point.y), taken, (x0, y1, x1, y0)))
    return "".join(out)


def _label(text: str, x: float, y: float, taken: list[tuple], frame: tuple) -> str:
    """The label where it overlaps least of what is there: beside its point, else above or below it, else further off."""
    size, best = LETTER * len(text), None
    for far in (0, 1, 2, 3, 4):
        for side in (1, -1):
            for rise in ((0, -1, 1) if far == 0 else (-far, far, -far - 0.5, far + 0.5)):
                start = x + 8 if side > 0 else x - 8 - size
                box = (start, y + rise * LINE - 7, start + size, y + rise * LINE + 6)
                outside = max(frame[0] - box[0], box[2] - frame[2], frame[1] - box[1], box[3] - frame[3], 0) * 40
                cost = outside + far * 2 + abs(rise) + sum(_overlap(box, other) for other in taken)
                if best is None or cost < best[0]:
                    best = (cost, box, far)
        if best is not None and best[0] < far * 2 + 4:
            break
    assert best is not None
    _, box, far = best
    taken.append(box)
    near = min(max(x, box[0]), box[2])
    line = f'<line class="frame" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{(box[1] + box[3]) / 2:.1f}"/>' if far else ""
    return f'{line}<text class="text" x="{box[0]:.1f}" y="{box[3] - 2:.1f}">{escape(text)}</text>'


def _overlap(one: tuple, other: tuple) -> float:
    """Square pixels that two boxes share."""
    return max(min(one[2], other[2]) - max(one[0], other[0]), 0) * max(min(one[3], other[3]) - max(one[1], other[1]), 0)


def _marks(low: float, high: float, panel: Panel) -> list[float]:
    """Values to write under the x axis; `low` and `high` are logarithms to base 2 where the axis is logarithmic."""
    if not panel.log:
        return _even(low, high)
    step = next(each for each in (1, 2, 3, 4, 5, 8, 10, 16, 32, 64) if (high - low) / each <= 8)
    powers = range(math.ceil(low), math.floor(high) + 1)
    marks = [2.0**power for power in powers if power % step == 0]
    if panel.binary and len(marks) > 1:
        return marks
    fine = high - low < 7  # less than two decades
    decades = [digit * 10.0**power for power in range(math.floor(low * 0.3) - 1, math.ceil(high * 0.302) + 1)
               for digit in ((1, 2, 5) if fine else (1,))]
    return [value for value in decades if low <= math.log2(value) <= high] or [2.0 ** ((low + high) / 2)]


def _even(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    base = 10.0 ** math.floor(math.log10(raw))
    step = base * next(each for each in (1, 2, 2.5, 5, 10) if each * base >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:g} {unit}"
        value /= 1024
    return ""

"""Line charts as inline SVG, readable without JavaScript, on a phone and in print.

Colours come from the page's style sheet: class `r0` is the first run's. Each run has a marker of
its own shape as well, so that no reader depends on colours. `data-*` attributes hold the values,
which the page's script shows under a pointer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from sid_fast.errors import one_line

STYLES = 8  # colours and markers; later runs use them again
MAX_POINTS = 300  # of a line; beyond, neighbours are averaged, with a band from least to greatest
_WIDTH, _HEIGHT = 460, 280
_TOP, _RIGHT, _BOTTOM = 14, 16, 44
_DIGIT = 8.6  # width of a digit in the largest font of a chart, user units
_MARKERS = 60  # on a line, at most
_FEW_MARKERS = 6  # on a line that is not made of single measurements

Point = tuple[float, float | None]  # None: not finite


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: Names it in the read-out and in the description for screen readers.
        style: Number of the run: colour and marker.
        points: In order of x.
        dashed: A second line of the same run.
        measured: Each point is a measurement of its own, which gets a marker.
    """

    label: str
    style: int
    points: Sequence[Point]
    dashed: bool = False
    measured: bool = False


@dataclasses.dataclass(frozen=True)
class Level:
    """A horizontal line across a chart; style None: it belongs to all runs."""

    label: str
    style: int | None
    value: float


@dataclasses.dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float  # pixels
    end: float

    def __call__(self, value: float) -> float:
        value = max(value, self.low) if self.log else value
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (v - a) / (b - a)

    def ticks(self) -> list[float]:
        if self.log:
            return log_ticks(self.low, self.high)
        return linear_ticks(self.low, self.high)


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    note: str = "",
    levels: Sequence[Level] = (),
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
) -> str:
    """Draw a chart as an HTML figure; empty if no line has a finite point.

    Args:
        title: Above the chart.
        lines: What to draw.
        x_label: Below the x axis.
        note: Explains the metric in a few words of HTML.
        levels: Horizontal lines.
        log_x: Logarithmic x axis; 0 is drawn at its left end.
        log_y: Logarithmic y axis, if all values are positive.
        from_zero: The linear y axis begins at 0, so that heights compare as ratios.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return ""
    xs = [x for line in lines for x, y in line.points if y is not None]
    ys = [y for line in lines for _, y in line.points if y is not None]
    ys += [level.value for level in levels]
    ys += [0.0] * from_zero
    log_y &= min(ys) > 0
    low, high = _limits(ys, log_y)
    vertical = _Axis(low, high, log_y, _HEIGHT - _BOTTOM, _TOP)
    labels = [(y, tick_label(y)) for y in vertical.ticks()]
    left = 14 + _DIGIT * max((len(text) for _, text in labels), default=1)
    horizontal, at_zero = _x_axis(xs, log_x, left)
    parts = [_grid(horizontal, vertical, labels, at_zero, x_label)]
    for level in levels:
        style = "all" if level.style is None else f"r{level.style % STYLES}"
        y = f"{vertical(level.value):.1f}"
        parts.append(
            f'<g class="level {style}"><line x1="{horizontal.start:.1f}" x2="{horizontal.end}" '
            f'y1="{y}" y2="{y}"/><title>{text(level.label)}: {value_text(level.value)}</title></g>'
        )
    parts += [_line(line, horizontal, vertical) for line in lines]
    summary = f"{one_line(title)} against {x_label}. " + " ".join(map(_summary, lines))
    summary += "".join(f" {one_line(v.label)}: {value_text(v.value)}." for v in levels)
    axis = f"{horizontal.low:.9g} {horizontal.high:.9g} {horizontal.start:.1f} {horizontal.end}"
    note = f"<p>{note}</p>" if note else ""
    return (
        f'<figure class="chart"><figcaption><h3>{text(title)}</h3>{note}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(summary)}" '
        f'data-x="{axis} {int(horizontal.log)}" data-unit="{text(x_label)}">'
        + "".join(parts)
        + '</svg><output class="readout" aria-hidden="true"></output></figure>'
    )


def text(value: object) -> str:
    """Escape text for HTML, in an element or a quoted attribute; unprintable characters go."""
    return escape(one_line(value), quote=True)


def value_text(value: float) -> str:
    """Show a measured value with four significant digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e-0", "e-")


def tick_label(value: float) -> str:
    """Show a round number in few characters."""
    if abs(value) >= 1e7:
        label = f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    elif abs(value) >= 1e4:
        label = f"{value:,.0f}"
    else:
        label = f"{value:.4g}".replace("e-0", "e-")
    return label.replace("-", "−")


def linear_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within the limits."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.6g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Four to seven numbers such as 1, 2, 5, 10 within the limits."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 6)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        powers = range(first, last + 1, every)
        ticks = [float(f"{m}e{p}") for p in powers for m in mantissas]
        ticks = [t for t in ticks if low <= t <= high]
        if 4 <= len(ticks) <= 7:
            return ticks
    return linear_ticks(low, high)


def thinned(points: Sequence[Point]) -> list[tuple[float, float | None, float, float]]:
    """Average neighbours until at most MAX_POINTS are left: x, mean, least and greatest value."""
    size = -(-len(points) // MAX_POINTS)
    result: list[tuple[float, float | None, float, float]] = []
    for start in range(0, len(points), size or 1):
        part = points[start : start + size]
        ys = [y for _, y in part if y is not None]
        x = sum(x for x, _ in part) / len(part)
        if ys:
            result.append((x, sum(ys) / len(ys), min(ys), max(ys)))
        else:
            result.append((x, None, 0.0, 0.0))
    return result


def marker(style: int, x: float = 0, y: float = 0) -> str:
    """The SVG shape that marks points of a run."""
    shapes: tuple[Callable[[], str], ...] = (
        lambda: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        lambda: f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>',
        lambda: _polygon(x, y, ((0, -5), (4.8, 3.6), (-4.8, 3.6))),
        lambda: _polygon(x, y, ((0, -5.4), (5.4, 0), (0, 5.4), (-5.4, 0))),
        lambda: _polygon(x, y, ((0, 5), (4.8, -3.6), (-4.8, -3.6))),
        lambda: _polygon(x, y, ((-5, -1.8), (5, -1.8), (5, 1.8), (-5, 1.8))),
        lambda: _polygon(x, y, ((-1.8, -5), (1.8, -5), (1.8, 5), (-1.8, 5))),
        lambda: _polygon(x, y, ((-5, 0), (0, -2), (5, 0), (0, 2))),
    )
    return shapes[style % STYLES]()


def _polygon(x: float, y: float, corners: Iterable[tuple[float, float]]) -> str:
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"/>'


def _limits(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.06, 1.03)
        return low / margin, high * margin
    equal = high - low <= 1e-9 * max(abs(low), abs(high))
    margin = (0.1 * abs(high) or 1.0) if equal else 0.06 * (high - low)
    keep_zero = low >= 0 and low <= 0.25 * high  # rather than a tick just above 0
    return (0.0 if keep_zero else low - margin), high + margin


def _x_axis(xs: Sequence[float], log: bool, left: float) -> tuple[_Axis, bool]:
    """Return the x axis, and whether its left end stands for 0."""
    right, positive = _WIDTH - _RIGHT, [x for x in xs if x > 0]
    if log and positive:
        at_zero = len(positive) < len(xs)
        low, high = min(positive) / (2 if at_zero else 1.1), max(positive) * 1.06
        return _Axis(low, high, True, left + 8 * at_zero, right), at_zero
    low, high = min(xs), max(xs)
    low = 0.0 if 0 <= low < high / 2 else low
    return _Axis(low, high if high > low else low + 1, False, left, right), False


def _grid(
    horizontal: _Axis,
    vertical: _Axis,
    labels: Sequence[tuple[float, str]],
    at_zero: bool,
    x_label: str,
) -> str:
    parts, left, right = [], horizontal.start - 8 * at_zero, horizontal.end
    for y, label in labels:
        at = f"{vertical(y):.1f}"
        parts.append(f'<line x1="{left:.1f}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at}" dy=".35em" class="y">{label}</text>')
    ticks = [(x, tick_label(x)) for x in horizontal.ticks()]
    if at_zero:
        ticks = [(horizontal.low, "0"), *((x, t) for x, t in ticks if x > 1.5 * horizontal.low)]
    bottom, free = _HEIGHT - _BOTTOM, -math.inf
    for x, label in ticks:
        place, half = horizontal(x), _DIGIT * len(label) / 2
        if place - half < free:
            continue
        free = place + half + 6
        parts.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{place:.1f}" y="{bottom + 17}">{label}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 6}" class="name">{text(x_label)}</text>')
    return f'<g class="axes">{"".join(parts)}</g>'


def _line(line: Line, horizontal: _Axis, vertical: _Axis) -> str:
    points = thinned(line.points)
    runs: list[list[tuple[float, float, float, float]]] = [[]]
    for x, y, low, high in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((horizontal(x), vertical(y), vertical(low), vertical(high)))
    runs = [run for run in runs if run]
    parts = []
    if len(points) < len(line.points):
        for run in runs:
            upper = [f"{x:.1f},{high:.1f}" for x, _, _, high in run]
            lower = [f"{x:.1f},{low:.1f}" for x, _, low, _ in reversed(run)]
            parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
    for run in runs:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in run)
        parts.append(f'<polyline points="{path}"/>')
    drawn = [(x, y) for run in runs for x, y, _, _ in run]
    few = _MARKERS if line.measured else _FEW_MARKERS
    every = max(1, -(-len(drawn) // few))
    offset = 0 if line.measured else (line.style % 3) * every // 3  # lines may coincide
    marked = drawn[offset::every] or drawn
    parts += [marker(line.style, x, y) for x, y in marked]
    values = " ".join(f"{x:.6g}:{y:.4g}" for x, y, _, _ in points if y is not None)
    dashed = " dashed" if line.dashed else ""
    return (
        f'<g class="line r{line.style % STYLES}{dashed}" data-label="{text(line.label)}" '
        f'data-v="{values}">{"".join(parts)}</g>'
    )


def _summary(line: Line) -> str:
    finite = [(x, y) for x, y in line.points if y is not None]
    (x0, y0), (x1, y1) = finite[0], finite[-1]
    summary = f"{one_line(line.label)}: {value_text(y0)} at {value_text(x0)}"
    if len(finite) > 1:
        summary += f", {value_text(y1)} at {value_text(x1)}"
    return summary + "."

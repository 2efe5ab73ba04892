"""The plots of a report as inline SVG.

The colours are variables of the page's style sheet, so that plots follow light and dark.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 280  # units of the SVG's viewBox
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 42  # margins
TICKS = 5
MOST_CIRCLES = 12  # of a curve


@dataclass(frozen=True)
class Curve:
    """Such as the scores of one trial by epoch. `kind` is its class in the style sheet: winner,
    default or other. `places`: where each value lies, such as the epochs that were validated; by
    default 1, 2, 3, …
    """

    label: str
    values: Sequence[float]
    kind: str = "other"
    places: Sequence[float] = ()

    @property
    def points(self) -> list[tuple[float, float]]:
        """Each place, such as an epoch, with its value."""
        places = self.places or range(1, len(self.values) + 1)
        return list(zip(places, self.values, strict=True))


@dataclass(frozen=True)
class Point:
    """A trial in the plot of score against cost."""

    label: str
    x: float
    y: float
    kind: str = "other"


@dataclass(frozen=True)
class Scale:
    """Maps values to a side of the plot; `is_log` for a logarithmic one."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._transform(self.low), self._transform(self.high)
        share = (self._transform(value) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def _transform(self, value: float) -> float:
        return math.log10(max(value, 1e-9)) if self.is_log else value

    def ticks(self) -> list[float]:
        """Round values within the range."""
        if self.is_log:
            steps = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for multiples in ((1, 2, 5), range(1, 10)):
                values = [10.0**s * m for s in steps for m in multiples]
                shown = [value for value in values if self.low <= value <= self.high]
                if len(shown) > 2:
                    break
            return shown if len(shown) <= TICKS + 2 else shown[:: math.ceil(len(shown) / TICKS)]
        step = _round_step((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(raw: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    if raw <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def learning_curves(curves: Sequence[Curve], y_label: str) -> str:
    """The score by epoch; the last curves lie on top. Empty where there are no scores."""
    drawn = [c for c in curves if c.values]
    if not drawn:
        return ""
    last = max(epoch for c in drawn for epoch, _ in c.points)
    x = Scale(1, max(2, last), LEFT, WIDTH - RIGHT)
    y = scale_of_scores([value for c in drawn for value in c.values])
    parts = []
    for curve in drawn:
        dots = [(x(epoch), y(value)) for epoch, value in curve.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in dots)
        title = f"<title>{escape(curve.label)}</title>"
        parts.append(f'<g class="{curve.kind}">{title}<polyline points="{path}"/>')
        if curve.kind != "other" or len(dots) == 1:
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in dots]
        parts.append("</g>")
    whole = number_ticks([tick for tick in x.ticks() if tick == int(tick)])
    return draw_frame(parts, x, y, whole, "epoch", y_label, f"{y_label} by epoch")


def score_against_cost(points: Sequence[Point], front: Sequence[Point], y_label: str) -> str:
    """Each trial by its seconds and its score, and the line of the best for each price."""
    if not points:
        return ""
    costs = [max(p.x, 0.01) for p in points]
    x = Scale(min(costs) / 1.2, max(costs) * 1.2, LEFT, WIDTH - RIGHT, is_log=True)
    y = scale_of_scores([p.y for p in points])
    steps = []
    for before, after in itertools.pairwise(front):
        steps += [(before.x, before.y), (after.x, before.y)]
    steps += [(x, p.y) for p in front[-1:] for x in (p.x, max(costs) * 1.2)]
    path = " ".join(f"{x(max(px, 0.01)):.1f},{y(py):.1f}" for px, py in steps)
    parts = [f'<g class="front"><polyline points="{path}"/></g>']
    for point in points:
        radius = 4 if point.kind == "other" else 6
        parts.append(
            f'<g class="{point.kind}"><title>{escape(point.label)}</title>'
            f'<circle cx="{x(max(point.x, 0.01)):.1f}" cy="{y(point.y):.1f}" r="{radius}"/></g>'
        )
    x_label, ticks = "seconds of training", number_ticks(x.ticks())
    return draw_frame(parts, x, y, ticks, x_label, y_label, f"{y_label} against {x_label}")


def unit_plot(curves: Sequence[Curve], x_label: str, y_label: str, *, diagonal: bool) -> str:
    """Curves between 0 and 1 on both axes, with circles at their points where there are few.

    `diagonal`: with a dashed line where both are equal.
    """
    x, y = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - BOTTOM, TOP)
    parts = []
    if diagonal:
        ends = f"{x(0):.1f},{y(0):.1f} {x(1):.1f},{y(1):.1f}"
        parts.append(f'<g class="front"><polyline points="{ends}"/></g>')
    for curve in curves:
        dots = [(x(at), y(value)) for at, value in curve.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in dots)
        title = f"<title>{escape(curve.label)}</title>"
        parts.append(f'<g class="{curve.kind}">{title}<polyline points="{path}"/>')
        if len(dots) <= MOST_CIRCLES:
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in dots]
        parts.append("</g>")
    ticks = number_ticks(x.ticks())
    return draw_frame(parts, x, y, ticks, x_label, y_label, f"{y_label} by {x_label}")


def number_ticks(values: Sequence[float]) -> list[tuple[float, str]]:
    """Numbers with what is written at them."""
    return [(value, f"{value:g}") for value in values]


def scale_of_scores(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 0.05
    return Scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def draw_frame(
    parts: Sequence[str],
    x: Scale,
    y: Scale,
    x_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
    title: str,
) -> str:
    """The plot with its axes. `x_ticks`: values with what is written at them."""
    grid = []
    for tick in y.ticks():
        at = y(tick)
        grid.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        grid.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick, name in x_ticks:
        at, foot = x(tick), HEIGHT - BOTTOM + 16
        grid.append(f'<text x="{at:.1f}" y="{foot}" text-anchor="middle">{escape(name)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    grid.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    half = (TOP + HEIGHT - BOTTOM) / 2
    grid.append(
        f'<text class="label" x="12" y="{half}" text-anchor="middle" '
        f'transform="rotate(-90 12 {half})">{escape(y_label)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<g class="grid">{"".join(grid)}</g>{"".join(parts)}</svg>'
    )

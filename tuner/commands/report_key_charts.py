"""The plots of a report of what the searched keys do: one plot a key, and all keys at once."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from tuner.commands.report_charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Point,
    Scale,
    draw_frame,
    scale_of_scores,
)
from tuner.commands.trial_line import plain_value

WIDE, WIDE_SIDE, WIDE_TOP, WIDE_BOTTOM = 940, 70, 34, 20  # of the plot of all keys
NAME_ROOM, LONGEST_BESIDE = 56, 10  # characters of all names below a plot, of one beside an axis
PARTS = 3  # of a range, in the table of what a key does


@dataclass(frozen=True)
class Axis:
    """A searched key with the values that it may have: a range, or choices, which are counted."""

    key: str
    low: float
    high: float
    is_log: bool = False
    choices: tuple[str, ...] = ()

    def scale(self, start: float, end: float) -> Scale:
        return Scale(self.low, self.high, start, end, self.is_log)

    def ticks(self, longest: int = NAME_ROOM) -> list[tuple[float, str]]:
        """Values with what is written at them, in so many characters at most."""
        if self.choices:
            room = min(longest, max(3, NAME_ROOM // len(self.choices)))
            return [
                (float(i), name if len(name) <= room else f"{name[: room - 1]}…")
                for i, name in enumerate(self.choices)
            ]
        return [(value, f"{value:g}") for value in self.scale(0, 1).ticks()]

    def place(self, value: object) -> float:
        """A value of the key as a number: itself, or which choice it is."""
        if self.choices:
            return float(self.choices.index(plain_value(value)))
        assert isinstance(value, (int, float))
        return float(value)

    def place_of(self, params: Mapping[str, object]) -> float | None:
        """The place of a trial's value of the key; None where the trial lacks the key."""
        return self.place(params[self.key]) if self.key in params else None


@dataclass(frozen=True)
class TrialLine:
    """A trial in the plot of all keys: where it lies on each axis; None where it lacks the key.

    `share`: how good its score is among the shown ones, 0 to 1.
    """

    label: str
    places: Sequence[float | None]
    kind: str
    share: float


def axes_of(trials: Sequence[FrozenTrial]) -> dict[str, Axis]:
    """The axis of each searched key that had more than one value."""
    domains: dict[str, list[BaseDistribution]] = {}
    tried: dict[str, set[str]] = {}
    for trial in trials:
        for key, value in trial.params.items():
            domains.setdefault(key, []).append(trial.distributions[key])
            tried.setdefault(key, set()).add(plain_value(value))
    return {key: axis_of(key, domains[key]) for key, values in tried.items() if len(values) > 1}


def axis_of(key: str, domains: Sequence[BaseDistribution]) -> Axis:
    """The axis of all values that some trials might have had; a range may have been changed."""
    if isinstance(domains[0], CategoricalDistribution):
        choices = [choice for domain in domains for choice in getattr(domain, "choices", ())]
        names = tuple(dict.fromkeys(map(plain_value, choices)))
        return Axis(key, -0.5, len(names) - 0.5, choices=names)
    low = min(float(getattr(domain, "low", 0)) for domain in domains)
    high = max(float(getattr(domain, "high", 1)) for domain in domains)
    return Axis(key, low, high, is_log=all(getattr(domain, "log", False) for domain in domains))


def slice_plot(axis: Axis, points: Sequence[Point], y_label: str) -> str:
    """The scores of trials over the values of one key."""
    margin = 8  # of the outermost points from the frame
    x = axis.scale(LEFT + margin, WIDTH - RIGHT - margin)
    y = scale_of_scores([point.y for point in points])
    parts = [
        f'<g class="{point.kind}"><title>{escape(point.label)}</title><circle '
        f'cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" r="{4 if point.kind == "other" else 6}"/></g>'
        for point in points
    ]
    return draw_frame(parts, x, y, axis.ticks(), axis.key, y_label, f"{y_label} by {axis.key}")


def parallel_plot(axes: Sequence[Axis], lines: Sequence[TrialLine], title: str) -> str:
    """A line a trial through its value on each axis; the last axis is the score."""
    columns = [
        WIDE_SIDE + i * (WIDE - 2 * WIDE_SIDE) / max(1, len(axes) - 1) for i in range(len(axes))
    ]
    scales = [axis.scale(HEIGHT - WIDE_BOTTOM, WIDE_TOP) for axis in axes]
    grid = []
    for axis, scale, column in zip(axes, scales, columns, strict=True):
        grid.append(
            f'<line x1="{column:.1f}" x2="{column:.1f}" y1="{WIDE_TOP}" '
            f'y2="{HEIGHT - WIDE_BOTTOM}"/><text class="label" x="{column:.1f}" y="{TOP + 4}" '
            f'text-anchor="middle">{escape(axis.key)}</text>'
        )
        grid += [
            f'<text x="{column - 5:.1f}" y="{scale(value) + 4:.1f}" text-anchor="end">'
            f"{escape(name)}</text>"
            for value, name in axis.ticks(LONGEST_BESIDE)
        ]
    drawn = [_trial_path(line, scales, columns) for line in lines]
    return (
        f'<svg viewBox="0 0 {WIDE} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<g class="grid">{"".join(grid)}</g>{"".join(drawn)}</svg>'
    )


def _trial_path(line: TrialLine, scales: Sequence[Scale], columns: Sequence[float]) -> str:
    """Lines between neighbouring axes on which the trial has values."""
    places = [
        None if place is None else (column, scale(place))
        for place, scale, column in zip(line.places, scales, columns, strict=True)
    ]
    steps = [
        f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"
        for start, end in itertools.pairwise(places)
        if start is not None and end is not None
    ]
    strength = 1.0 if line.kind != "other" else 0.2 + 0.8 * line.share
    return (
        f'<g class="{line.kind}" style="opacity:{strength:.2f}"><title>{escape(line.label)}'
        f'</title><path d="{"".join(steps)}"/></g>'
    )


def key_rows(
    axes: Mapping[str, Axis], trials: Sequence[FrozenTrial], sign: int
) -> list[tuple[str, str, str, str, str]]:
    """What each key does, as a table: the values, how many trials had them, and the best and the
    median score of these. A range is told in parts. `sign`: -1 where lower scores are better.
    """
    rows = []
    for axis in axes.values():
        position = axis.scale(0, PARTS)
        parts: dict[int, list[tuple[float, float]]] = {}
        for trial in trials:
            if axis.key in trial.params:
                place = axis.place(trial.params[axis.key])
                part = int(place) if axis.choices else min(PARTS - 1, int(position(place)))
                parts.setdefault(part, []).append((place, sign * float(trial.value or 0)))
        for _, tried in sorted(parts.items()):
            scores = [score for _, score in tried]
            best, middle = (f"{sign * s:.4f}" for s in (max(scores), statistics.median(scores)))
            places = [place for place, _ in tried]
            rows.append((axis.key, _name_values(axis, places), str(len(tried)), best, middle))
    return rows


def _name_values(axis: Axis, places: Sequence[float]) -> str:
    if axis.choices:
        return axis.choices[int(places[0])]
    low, high = (f"{value:.4g}" for value in (min(places), max(places)))
    return low if low == high else f"{low} to {high}"

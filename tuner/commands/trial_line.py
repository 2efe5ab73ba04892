"""A finished trial as one line whose columns stand under each other:

#12 acc 0.9430 ★ (best 0.9430 #12) lr 3.1e-3 freeze 3/5 ep 10/10 41s | 12/50, 3 pruned, eta 18m
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tuner.config.run import Run
from tuner.config.space import Choice, Dimension, Space
from tuner.search.history import DUPLICATE_OF, REASON

METRIC_LABELS = {
    "accuracy": "acc",
    "balanced_accuracy": "bacc",
    "log_likelihood": "ll",
    "average_precision": "ap",
    "expected_calibration_error": "ece",
}
KEY_LABELS = {
    "momentum": "mom",
    "weight_decay": "wd",
    "batch_size": "batch",
    "label_smoothing": "smooth",
}
KEYS_WITH_OWN_COLUMN = ("freeze_depth", "freeze", "epochs")  # they have columns of their own
PROGRESS_WIDTH = 36  # what `| 12/50, 3 pruned, eta 18m` may need


class TrialLineFormatter:
    """The widths that all lines of a study share.

    `terminal_width`: in columns; None where lines may have any length.
    """

    def __init__(
        self, space: Space, metric: str, budget: int, max_depth: int, terminal_width: int | None
    ) -> None:
        self.metric = short_label(metric)
        # by key; a trial has a value for at most one of a key's dimensions
        self.dimensions: dict[str, list[Dimension]] = {}
        for d in space.dimensions:
            if d.key not in KEYS_WITH_OWN_COLUMN:
                self.dimensions.setdefault(d.key, []).append(d)
        self.number_width, self.max_depth = len(str(budget)) + 1, max_depth
        self.epoch_width = len(str(space.highest(("recipe", "epochs"))))
        widest = {of_key[0].name: 0.5 for of_key in self.dimensions.values()}
        self.bare_width = (
            self.number_width
            + len(self.format_score(0.5))
            + 3
            + len(self.format_params(widest))
            + len(f" freeze {max_depth}/{max_depth} ep  1m40s pruned")
            + 2 * self.epoch_width
            + 1
        )
        self.best_width = len(self.format_best((0.5, 0))) + 1
        self.fit_to(terminal_width)

    def fit_to(self, terminal_width: int | None) -> None:
        """Leaves out of the lines to come what a terminal of this width has no room for; None:
        there is no terminal.
        """
        room = math.inf if terminal_width is None else terminal_width
        with_best = self.bare_width + self.best_width
        self.shows_best = with_best <= room
        self.shows_progress = with_best + PROGRESS_WIDTH <= room

    def format_line(
        self,
        trial: FrozenTrial,
        run: Run,
        seconds: float,
        best: tuple[float, int] | None,
        progress: str,
    ) -> str:
        epochs = max(trial.intermediate_values, default=0)
        star = "★" if best and best[1] == trial.number else " "
        width = self.epoch_width
        ended = (
            f"ep {epochs:>{width}}/{run.recipe.epochs:<{width}} "
            f"{format_duration(seconds):<5}{describe_end(trial)}"
        )
        parts = [
            f"#{trial.number:<{self.number_width - 1}}",
            self.format_score(reached_score(trial)),
            star,
            self.format_best(best) if self.shows_best else "",
            self.format_params(trial.params),
            self.format_frozen(run),
            ended.rstrip() if not self.shows_progress else f"{ended:<{2 * self.epoch_width + 17}}",
            f"| {progress}" if self.shows_progress else "",
        ]
        return " ".join(part for part in parts if part).rstrip()

    def format_frozen(self, run: Run) -> str:
        if run.recipe.freeze is not None:
            return f"freeze {run.recipe.freeze:4.0%}"
        return f"freeze {run.recipe.freeze_depth:>{len(str(self.max_depth))}}/{self.max_depth}"

    def format_score(self, value: float | None) -> str:
        width = len(self.metric) + 7
        return f"{f'{self.metric} {value:.4f}' if value is not None else 'no score':<{width}}"

    def format_best(self, best: tuple[float, int] | None) -> str:
        return f"{f'(best {best[0]:.4f} #{best[1]})' if best else '':<{14 + self.number_width}}"

    def format_params(self, params: Mapping[str, Any]) -> str:
        """A cell for each searched key, blank where the trial has none."""
        cells = []
        for key, dimensions in self.dimensions.items():
            label = "" if has_words(dimensions) else f"{KEY_LABELS.get(key, key)} "
            value = next((params[d.name] for d in dimensions if d.name in params), None)
            has_value = any(d.name in params for d in dimensions)
            text = f"{label}{format_value(value, 2)}" if has_value else ""
            cells.append(f"{text:<{len(label) + max(map(max_value_width, dimensions))}}")
        return " ".join(cells)


def has_words(dimensions: Sequence[Dimension]) -> bool:
    """Whether the values of a key are words, which say by themselves what they are."""
    domains = [d.domain for d in dimensions]
    return all(isinstance(d, Choice) and isinstance(d.options[0], str) for d in domains)


def short_label(metric: str) -> str:
    """The name of a metric in a line that has little space."""
    return METRIC_LABELS.get(metric, metric.rpartition(":")[2])


def max_value_width(dimension: Dimension) -> int:
    """How long a value of this dimension can become."""
    domain = dimension.domain
    if isinstance(domain, Choice):
        return max(len(format_value(option, 2)) for option in domain.options)
    if domain.integer:
        return max(len(str(int(end))) for end in (domain.lowest, domain.highest))
    return 6  # such as 1.6e-3


def reached_score(trial: FrozenTrial) -> float | None:
    """A completed trial's value, another's last score."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return trial.intermediate_values.get(max(trial.intermediate_values, default=0))


def describe_end(trial: FrozenTrial) -> str:
    """What was unusual about a trial's end."""
    if DUPLICATE_OF in trial.user_attrs:
        return f" same as #{trial.user_attrs[DUPLICATE_OF]}"
    reason = (str(trial.user_attrs.get(REASON, "")).splitlines() or [""])[0]
    if trial.state == TrialState.COMPLETE:
        return f" {reason}" if reason else ""
    if trial.state == TrialState.PRUNED:
        return f" pruned{f' ({reason})' if reason else ''}"
    return (
        f" FAILED ({reason or 'ended by somebody else'})" if trial.state == TrialState.FAIL else ""
    )


def format_value(value: Any, digits: int = 3) -> str:
    """0.925 -> '0.92'; 0.00161 -> '1.6e-3' with two digits."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def plain_value(value: Any) -> str:
    """0.0005 and not 5.00e-4, where there is space: people know decimals better."""
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def format_duration(seconds: float) -> str:
    """90 -> '1m30s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

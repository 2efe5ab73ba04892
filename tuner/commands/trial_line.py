"""A finished trial as one line whose columns stand under each other:

#12 acc 0.9430 ★ (best 0.9430 #12) lr 3.1e-3 freeze 3/5 ep 10/10 41s | 12/50, 3 pruned, eta 18m
"""

from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tuner.config.run import Run
from tuner.config.space import Choice, Dimension, Range, Space
from tuner.search.history import REASON, SAME_AS

METRICS = {"accuracy": "acc", "balanced_accuracy": "bacc", "log_likelihood": "ll"}
SHORT = {
    "momentum": "mom",
    "weight_decay": "wd",
    "batch_size": "batch",
    "label_smoothing": "smooth",
}
ELSEWHERE = ("freeze_depth", "epochs")  # they have columns of their own
TALLY = 36  # what `| 12/50, 3 pruned, eta 18m` may need


class Columns:
    """The widths that every line of a study shares. `room`: the terminal's width, None where lines may be of any length."""

    def __init__(
        self, space: Space, metric: str, budget: int, depth: int, room: int | None
    ) -> None:
        self.metric = METRICS.get(metric, metric)
        self.dimensions = [d for d in space.dimensions if d.name not in ELSEWHERE]
        self.number, self.depth = len(str(budget)) + 1, depth
        last = next((d.leaf for d in space.dimensions if d.name == "epochs"), None)
        self.epochs = len(str(max(last.members() or (1,)) if last else space.run({}).recipe.epochs))
        widest = {d.name: 0.5 for d in self.dimensions}
        bare = (
            self.number
            + len(self.score(0.5))
            + 3
            + len(self.params(widest))
            + len(f" freeze {depth}/{depth} ep  1m40s pruned")
            + 2 * self.epochs
            + 1
        )
        best = len(self.best((0.5, 0))) + 1
        self.shows_best = room is None or bare + best <= room
        self.shows_tally = room is None or bare + best + TALLY <= room

    def line(
        self,
        trial: FrozenTrial,
        run: Run,
        seconds: float,
        best: tuple[float, int] | None,
        tally: str,
    ) -> str:
        epochs = max(trial.intermediate_values, default=0)
        star = "★" if best and best[1] == trial.number else " "
        ended = f"ep {epochs:>{self.epochs}}/{run.recipe.epochs:<{self.epochs}} {spoken(seconds):<5}{how(trial)}"
        parts = [
            f"#{trial.number:<{self.number - 1}}",
            self.score(reached(trial)),
            star,
            self.best(best) if self.shows_best else "",
            self.params(trial.params),
            f"freeze {run.recipe.freeze_depth:>{len(str(self.depth))}}/{self.depth}",
            ended.rstrip() if not self.shows_tally else f"{ended:<{2 * self.epochs + 17}}",
            f"| {tally}" if self.shows_tally else "",
        ]
        return " ".join(part for part in parts if part).rstrip()

    def score(self, value: float | None) -> str:
        width = len(self.metric) + 7
        return f"{f'{self.metric} {value:.4f}' if value is not None else 'no score':<{width}}"

    def best(self, best: tuple[float, int] | None) -> str:
        return f"{f'(best {best[0]:.4f} #{best[1]})' if best else '':<{14 + self.number}}"

    def params(self, params: Mapping[str, Any]) -> str:
        """A cell for each searched key, blank where the trial has none."""
        cells = []
        for d in self.dimensions:
            label = (
                ""
                if isinstance(d.leaf, Choice) and isinstance(d.leaf.options[0], str)
                else f"{SHORT.get(d.name, d.name)} "
            )
            text = f"{label}{shown(params[d.name], 2)}" if d.name in params else ""
            cells.append(f"{text:<{len(label) + widest(d)}}")
        return " ".join(cells)


def widest(d: Dimension) -> int:
    """How long a value of this key can become."""
    if isinstance(d.leaf, Range):
        return max(len(str(int(d.leaf.low))), len(str(int(d.leaf.high)))) if d.leaf.integer else 6
    return max(len(shown(option, 2)) for option in d.leaf.options)


def reached(trial: FrozenTrial) -> float | None:
    """A completed trial's value, another's last score."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return trial.intermediate_values.get(max(trial.intermediate_values, default=0))


def how(trial: FrozenTrial) -> str:
    """What was unusual about a trial's end."""
    if SAME_AS in trial.user_attrs:
        return f" same as #{trial.user_attrs[SAME_AS]}"
    reason = (str(trial.user_attrs.get(REASON, "")).splitlines() or [""])[0]
    if trial.state == TrialState.PRUNED:
        return f" pruned{f' ({reason})' if reason else ''}"
    return (
        f" FAILED ({reason or 'ended by somebody else'})" if trial.state == TrialState.FAIL else ""
    )


def shown(value: Any, digits: int = 3) -> str:
    """0.925 -> '0.92'; 0.00161 -> '1.6e-3' with two digits."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def spoken(seconds: float) -> str:
    """90 -> '1m30s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

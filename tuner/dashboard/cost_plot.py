"""Score against cost, as a plot that the dashboard's page draws."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from tuner.search import history

NAME = "score-against-cost"
MAX_TRIALS = 1000  # the latest; more would make each look slow
LEAST_SECONDS = 0.01  # on a logarithmic axis


def cost_plot(
    trials: Sequence[FrozenTrial], direction: StudyDirection, metric: str
) -> dict[str, str]:
    """The plot by its name, in the form of plotly's JSON; empty where no trial has completed."""
    ranked = (t for t in trials[-MAX_TRIALS:] if history.trial_rank(t, direction) is not None)
    ended = [t for t in ranked if t.duration is not None]
    if not ended:
        return {}
    front = history.pareto_front(ended, direction)
    steps = [(_seconds(t), t.value) for t in front[:1]]
    for before, after in itertools.pairwise(front):
        steps += [(_seconds(after), before.value), (_seconds(after), after.value)]
    steps.append((max(map(_seconds, ended)), front[-1].value))
    figure = {
        "data": [
            _trace("trials", [(_seconds(t), t.value) for t in ended])
            | {"mode": "markers", "text": [f"trial {t.number}" for t in ended]},
            _trace("best for the time", steps) | {"mode": "lines", "line": {"dash": "dot"}},
        ],
        "layout": {
            "title": {"text": "Score against cost"},
            "xaxis": {"title": {"text": "seconds of training"}, "type": "log"},
            "yaxis": {"title": {"text": metric}},
        },
    }
    return {NAME: json.dumps(figure)}


def _trace(name: str, points: Sequence[tuple[float, float | None]]) -> dict[str, Any]:
    x, y = zip(*points, strict=True)
    return {"type": "scatter", "name": name, "x": list(x), "y": list(y)}


def _seconds(trial: FrozenTrial) -> float:
    assert trial.duration is not None
    return max(LEAST_SECONDS, round(trial.duration.total_seconds(), 2))

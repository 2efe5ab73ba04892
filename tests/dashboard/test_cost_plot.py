"""The dashboard's plot of score against cost."""

import json
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuner.dashboard.cost_plot import NAME, cost_plot
from tuner.search.history import DUPLICATE_OF


def trial(
    number: int, seconds: float, value: float, state: TrialState = TrialState.COMPLETE
) -> FrozenTrial:
    made = create_trial(state=state, value=value if state == TrialState.COMPLETE else None)
    made.number, made.datetime_start = number, datetime(2026, 1, 1)
    made.datetime_complete = made.datetime_start + timedelta(seconds=seconds)
    return made


@pytest.mark.parametrize("direction", [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE])
def test_completed_trials_are_points_and_the_best_for_the_time_is_a_line(
    direction: StudyDirection,
) -> None:
    sign = 1 if direction == StudyDirection.MAXIMIZE else -1
    scores = [(4.0, 0.5), (1.0, 0.6), (9.0, 0.9), (2.0, 0.4), (9.5, 0.8)]
    trials = [trial(i, seconds, sign * score) for i, (seconds, score) in enumerate(scores)]
    copy = trial(5, 0.1, sign * 1.0)
    copy.user_attrs = {DUPLICATE_OF: 2}  # it has the result of another and took no time
    pruned = trial(6, 3.0, 0.0, TrialState.PRUNED)
    figure = json.loads(cost_plot([*trials, copy, pruned], direction, "accuracy")[NAME])
    points, front = figure["data"]
    assert list(zip(points["x"], points["y"], strict=True)) == [(s, sign * v) for s, v in scores]
    assert points["text"][2] == "trial 2" and figure["layout"]["xaxis"]["type"] == "log"
    steps = [(x, sign * y) for x, y in zip(front["x"], front["y"], strict=True)]
    assert steps == [(1.0, 0.6), (9.0, 0.6), (9.0, 0.9), (9.5, 0.9)]
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(steps))


def test_without_a_completed_trial_there_is_no_plot() -> None:
    assert cost_plot([trial(0, 1.0, 0.0, TrialState.PRUNED)], StudyDirection.MAXIMIZE, "x") == {}

"""The result of a study: a test accuracy far below validation's is told, and chance is not."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.instant_engine import make_coordinator, make_space
from tuner.commands.progress import Progress
from tuner.commands.summary import validation_gap_lines, why_nothing_is_left
from tuner.commands.winner import progress_of
from tuner.config.search_settings import AS_MANY_AS_FIT


def lines(valid: float, test: float, valid_count: int = 400, test_count: int = 400) -> list[str]:
    scores = {"valid": {"accuracy": valid, "f1": 0.1}, "test": {"accuracy": test, "f1": 0.1}}
    return list(validation_gap_lines(scores, {"valid": valid_count, "test": test_count}))


def test_a_large_gap_is_told_in_standard_errors() -> None:
    first, second = lines(0.95, 0.85)
    assert first.strip() == (  # sqrt(0.9 * 0.1 * 2 / 400) = 0.0212
        "0.1000 below the validation accuracy, 4.7 standard errors: the test examples differ from "
        "the others, the search fitted"
    )
    assert "its 400 validation examples, or the retraining failed" in second


@pytest.mark.parametrize(
    ("valid", "test", "count"),
    [(0.95, 0.90, 400), (0.85, 0.95, 400), (1.0, 1.0, 400), (0.0, 0.0, 9), (1.0, 0.67, 9)],
)
def test_what_chance_makes_is_not(valid: float, test: float, count: int) -> None:
    assert lines(valid, test, count, count) == []


def test_two_draws_of_one_accuracy_are_seldom_told() -> None:
    draws = np.random.default_rng(0).binomial(300, 0.9, (2000, 2)) / 300
    told = sum(bool(lines(valid, test, 300, 300)) for valid, test in draws.tolist())
    assert told <= 10  # 0.13 % of 2000 is 3


def test_other_scores_have_no_such_error() -> None:
    scores = {"valid": {"map": 0.9}, "test": {"map": 0.1}}
    assert list(validation_gap_lines(scores, {"valid": 10, "test": 10})) == []
    assert lines(95.0, 10.0) == []  # a task of one's own that counts in percent


def test_more_trials_of_a_whole_grid_are_not_asked_for() -> None:
    for budget, says in ((1, "1 trial is all that"), (4, "the 4 different trials are all that")):
        assert says in why_nothing_is_left(Progress(budget, budget, is_whole=True))
    space = make_space(trials=20)
    for count, most in ((0, 20), (1, 20), (1, 2)):  # nothing to search; the optimizers alone
        search = space.settings.search.model_copy(update={"sampler": "grid", "trials": most})
        settings = replace(space.settings, search=search)
        few = replace(space, dimensions=space.dimensions[:count], settings=settings)
        assert progress_of(make_coordinator(few)).is_whole
    assert not progress_of(make_coordinator(make_space(trials=4))).is_whole


@pytest.mark.parametrize(
    ("used", "budget", "says"),
    [
        (20, 20, "20 of 20 trials are done; raise search.trials to go on"),
        (5, 20, "the search ended after 5 of 20 trials by search.stop, search.target or the time"),
        (5, AS_MANY_AS_FIT, "after 5 trials by search.stop, search.target or the time"),
    ],
)
def test_a_search_that_has_ended_says_what_ended_it(used: int, budget: int, says: str) -> None:
    assert says in why_nothing_is_left(Progress(used, budget))

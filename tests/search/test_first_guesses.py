"""`try:` in a space file: recipes that are tried first."""

import optuna
import pytest

from tests.conftest import SMALL
from tests.helpers.instant_engine import make_coordinator, run_all_jobs
from tuner.config import parsing, yaml_document
from tuner.config.space import Space, dump_yaml
from tuner.errors import SpaceError

optuna.logging.set_verbosity(optuna.logging.ERROR)
GUESSES = "[{lr: 0.002, freeze_depth: 3}, {optimizer: sgd, momentum: 0.9}]"


def space_with(guesses: str, *words: str) -> Space:
    doc = yaml_document.parse_document(f"{SMALL}try: {guesses}\n", "small.yaml")
    return parsing.parse_space(parsing.apply_overrides(doc, words))


def test_guesses_are_tried_right_after_the_default_recipe_also_after_an_interruption() -> None:
    space, storage = space_with(GUESSES, "search.trials=6"), optuna.storages.InMemoryStorage()
    run_all_jobs(make_coordinator(space, storage), most=3)
    continued = make_coordinator(space, storage)
    run_all_jobs(continued)
    params = [trial.params for trial in continued.study.trials]
    default = space.default_params()
    assert params[1] == default
    assert params[2] == default | {"lr": 0.002, "freeze_depth": 3}
    assert params[3] == {**default, "optimizer": "sgd", "momentum": 0.9}
    undisturbed = make_coordinator(space)
    run_all_jobs(undisturbed)
    assert [trial.params for trial in undisturbed.study.trials] == params and len(params) == 6


def test_a_file_with_guesses_is_read_back_as_it_was() -> None:
    space = space_with(GUESSES)
    again = parsing.parse_space(yaml_document.parse_document(dump_yaml(space.to_dict()), "again"))
    assert again.first_guesses == space.first_guesses and len(again.first_guesses) == 2


@pytest.mark.parametrize(
    ("guesses", "problem"),
    [
        ("{lr: 0.1}", "try: expected a list of recipes"),
        ("[{lr: 7}]", "try.0: lr: 7 is outside the study's range"),
        ("[{lr: 0.01}, {rl: 0.01}]", "try.1: rl: not searched by this study"),
        ("[{optimizer: adamw, momentum: 0.9}]", "momentum: not searched with these values"),
        ("[{}]", "name at least one key"),
    ],
)
def test_guesses_that_cannot_be_tried_are_refused_with_their_line(
    guesses: str, problem: str
) -> None:
    with pytest.raises(SpaceError, match=r"small\.yaml:15: ") as error:
        space_with(guesses)
    assert problem in str(error.value)

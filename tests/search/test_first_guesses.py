"""`try:` in a space file: recipes that are tried first."""

from pathlib import Path

import optuna
import pytest

from tests.conftest import SMALL
from tests.helpers.instant_engine import make_coordinator, run_all_jobs
from tuner.commands.run import late_guess_warning
from tuner.config import parsing, yaml_document
from tuner.config.space import Space, dump_yaml
from tuner.errors import SpaceError
from tuner.files.enqueued_files import write_enqueued

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


def test_a_guess_that_was_added_after_its_turn_is_told() -> None:
    storage = optuna.storages.InMemoryStorage()
    run_all_jobs(make_coordinator(space_with("[{lr: 0.002}]", "search.trials=4"), storage))
    more = space_with("[{lr: 0.002}, {lr: 0.05}, {lr: 0.06}]", "search.trials=6")
    coordinator = make_coordinator(more, storage)
    late = coordinator.proposer.late_guesses(coordinator.ledger.proposal_count)
    assert late == [dict(more.first_guesses[1])]  # the third one's turn is the next
    assert "1 recipe was added" in late_guess_warning(Path("studies/small"), late)
    settings = late_guess_warning(Path("elsewhere/small"), late).partition("`tuner enqueue ")[2]
    assert settings.startswith("elsewhere/small ") and " lr=0.05 " in settings
    new = make_coordinator(more)
    assert new.proposer.late_guesses(new.ledger.proposal_count) == []


def test_an_enqueued_trial_takes_no_guesss_place(tmp_path: Path) -> None:
    space = space_with(GUESSES, "search.trials=6")
    coordinator = make_coordinator(space)
    coordinator.enqueued_folder = tmp_path
    write_enqueued(tmp_path, space.default_params() | {"lr": 0.05})
    run_all_jobs(coordinator)
    tried = [trial.params for trial in coordinator.study.trials]
    default = space.default_params()
    assert tried[2:5] == [*map(dict, space.first_guesses), default | {"lr": 0.05}]


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


@pytest.mark.parametrize(
    ("guess", "problem"),
    [
        ("{batch_size: 3}", "batch_size: 3 is no step of the study's range, 2 to 8 by 3; "),
        ("{batch_size: 9}", "batch_size: 9 is no step of the study's range, 2 to 8 by 3; "),
        ("{ema: 0.15}", "ema: 0.15 is no step of the study's range, 0.1 to 0.5 by 0.1; "),
        ("{batch_size: '5'}", "batch_size: expected a number, 2 to 9, got the string '5'"),
        ("{optimizer: adamv}", "none of its choices: sgd, adamw; did you mean 'adamw'?"),
    ],
)
def test_a_guess_between_two_steps_or_of_another_kind_is_refused(guess: str, problem: str) -> None:
    steps = ("recipe.batch_size={low: 2, high: 9, step: 3}",)
    steps += ("recipe.ema={low: 0.1, high: 0.5, step: 0.1}",)
    with pytest.raises(SpaceError) as error:
        space_with(f"[{guess}]", *steps)
    assert problem in str(error.value)
    (known,) = space_with("[{batch_size: 5, ema: 0.3}]", *steps).first_guesses
    assert (known["batch_size"], known["ema"]) == (5, 0.3)


def test_where_a_share_may_be_none_the_linear_probe_freezes_the_largest() -> None:
    words = ("recipe.freeze=[null, 0.5, 1.0]", "recipe.freeze_depth=0")
    coordinator = make_coordinator(space_with("null", *words))
    assert coordinator.proposer.linear_probe_params["freeze"] == 1.0

"""Which trial wins: the best one, or the default recipe where that is as good within noise."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial

from tuner.config import parsing, yaml_document
from tuner.config.space import Space
from tuner.search import history, storage
from tuner.search.retraining import difference_noise
from tuner.search.winner_choice import choose_unconfirmed
from tuner.training.class_balance import macro_count

SPACE = """
task: classification
data: {name: synthetic}
model: {name: resnet18_slim, weights: bundled}
recipe: {lr: {low: 1e-4, high: 1e-1, log: true}}
search: {metric: accuracy}
"""


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "space.yaml").write_text(SPACE)
    return parsing.parse_space(yaml_document.read_document(tmp_path / "space.yaml"))


def study_of(
    *values: float, default: int = 0, valid: int | None = 250, direction: str = "maximize"
) -> optuna.Study:
    study = optuna.create_study(direction=direction)
    if valid is not None:
        history.keep_split_sizes(study, 500, valid)
    for number, value in enumerate(values):
        attributes = {history.BEST_EPOCH: 1, history.IS_DEFAULT_RECIPE: number == default}
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=value,
                params={"lr": 0.01},
                distributions={"lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)},
                user_attrs=attributes,
            )
        )
    return study


def test_a_gain_within_noise_leaves_the_default_recipe(space: Space) -> None:
    choice = choose_unconfirmed(study_of(0.760, 0.700, 0.772), space)
    assert (choice.winner.number, choice.beaten and choice.beaten.number) == (0, 2)
    assert choice.noise == pytest.approx(0.0237, abs=1e-4)


def test_a_gain_beyond_noise_wins(space: Space) -> None:
    choice = choose_unconfirmed(study_of(0.760, 0.700, 0.790), space)
    assert (choice.winner.number, choice.beaten) == (2, None)


def test_a_score_over_classes_has_the_noise_of_the_rare_class(space: Space) -> None:
    """33 of 250 examples are of one class: as noisy as with 115 of equal classes."""
    space = parsing.with_values(space.document, {("search", "metric"): "f1"})
    few = macro_count(torch.tensor([217, 33]))
    study = study_of(0.960, 0.973)
    assert choose_unconfirmed(study, space).winner.number == 1
    study.set_user_attr(history.MACRO_COUNT, few)
    choice = choose_unconfirmed(study, space)
    assert choice.winner.number == 0
    assert choice.noise == pytest.approx(difference_noise(0.973, few))


def test_the_examples_that_count_for_a_mean_over_classes() -> None:
    """Against a simulation: every example is right with probability 0.9."""
    assert macro_count(torch.tensor([50, 50, 0, 50])) == pytest.approx(150)
    rng, counts = np.random.default_rng(0), (217, 33)
    recalls = [rng.binomial(n, 0.9, size=20_000) / n for n in counts]
    spread = np.mean(recalls, 0).std()
    share = np.sqrt(0.9 * 0.1 / macro_count(torch.tensor(counts)))
    assert share == pytest.approx(spread, rel=0.03)


def test_a_study_knows_how_many_examples_count_for_its_score(small: Path, tuner: Any) -> None:
    words = ("search.trials=1", "search.retrain=false", "export=null")
    attributes = {}
    for metric in ("f1", "accuracy"):
        name = f"search.name={metric}"
        assert tuner("run", small, *words, f"search.metric={metric}", name).code == 0
        database = storage.open_storage(None, small.parent / "studies" / metric)
        attributes[metric] = optuna.load_study(study_name=metric, storage=database).user_attrs
    valid = attributes["f1"][history.SPLIT_SIZES][1]
    assert valid / 2 < attributes["f1"][history.MACRO_COUNT] <= valid
    assert history.MACRO_COUNT not in attributes["accuracy"]  # a share of all examples


def test_a_person_may_want_the_best_trial(space: Space) -> None:
    space = parsing.with_values(space.document, {("search", "winner"): "best"})
    assert choose_unconfirmed(study_of(0.760, 0.772), space).winner.number == 1


def test_more_examples_make_a_small_gain_real(space: Space) -> None:
    choice = choose_unconfirmed(study_of(0.760, 0.772, valid=2_500), space)
    assert choice.winner.number == 1


@pytest.mark.parametrize(
    ("metric", "valid", "default", "direction"),
    [
        ("auroc", 250, 0, "maximize"),  # its noise does not follow from the number of examples
        ("accuracy", None, 0, "maximize"),  # a study of an earlier version
        ("accuracy", 250, 1, "maximize"),  # the default recipe is the best itself
        ("accuracy", 250, 0, "minimize"),
    ],
)
def test_otherwise_the_best_trial_wins(
    metric: str, valid: int | None, default: int, direction: str, space: Space
) -> None:
    values = (0.76, 0.77) if direction == "maximize" else (0.77, 0.76)
    space = parsing.with_values(space.document, {("search", "metric"): metric})
    study = study_of(*values, default=default, valid=valid, direction=direction)
    assert choose_unconfirmed(study, space).winner.number == 1


def test_the_noise_is_that_of_correlated_shares() -> None:
    """Against a simulation: two models that are right on 80 % of the same 200 examples."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(4_000, 200))
    # normal values whose signs are correlated by about 0.6
    results = [
        0.9 * common + np.sqrt(1 - 0.81) * rng.normal(size=common.shape) < 0.8416 for _ in range(2)
    ]
    correlation = np.corrcoef(results[0].ravel(), results[1].ravel())[0, 1]
    assert correlation == pytest.approx(0.55, abs=0.06)
    spread = (results[0].mean(1) - results[1].mean(1)).std()
    assert difference_noise(0.8, 200) == pytest.approx(spread, rel=0.15)

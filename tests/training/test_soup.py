"""Soups: the greedy rule, the average of weights, the statistics of BatchNorm, and ingredients that froze different stages."""

import itertools
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.objective import Direction
from tuner.config.run import EngineSettings, PluginConfig, Run
from tuner.errors import DataError
from tuner.messages import Assignment, Ingredient, SoupJob
from tuner.training import batch_norm, soup
from tuner.training.checkpoint_content import load_best_weights
from tuner.training.epoch import predict_source
from tuner.training.training_loop import copy_state, run_training_examples

BATCH = 16


def run(**recipe: Any) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {"epochs": 1, "lr": 0.003, "freeze_depth": 0, "optimizer": "adamw"} | recipe
    return space.make_run({("recipe", key): value for key, value in chosen.items()}, seed=3)


def assignment_of(r: Run, folder: Path) -> Assignment:
    """The caches are shared by all tests, as are those of the command line."""
    engine, home = EngineSettings(device="cpu"), os.environ["TUNER_HOME"]
    return Assignment(r, "accuracy", engine, home, checkpoint_folder=str(folder))


def trained(r: Run, number: int, tmp_path: Path) -> Ingredient:
    """A trial of the run, with the weights that it left."""
    assignment = assignment_of(r, tmp_path / str(number))
    file = soup.retrain_ingredient(assignment, lambda _: True, 0)
    assert file is not None
    return Ingredient(number, r, file)


# -- the greedy rule


def brute_force(
    count: int, scores: dict[tuple[int, ...], float], sign: int
) -> tuple[list[float], tuple[int, ...]]:
    """The rule as the paper writes it: of a growing set, each average is compared with the last."""
    chosen: tuple[int, ...] = (0,)
    tried = [scores[chosen]]
    for new in range(1, count):
        union = (*chosen, new)
        tried.append(scores[union])
        if sign * scores[union] >= sign * scores[chosen]:
            chosen = union
    return tried, chosen


@pytest.mark.parametrize("direction", ["maximise", "minimise"])
def test_the_greedy_rule_is_the_papers(direction: Direction) -> None:
    rng, sign = random.Random(0), 1 if direction == "maximise" else -1
    sizes = set()
    for _ in range(50):
        scores = {
            (0, *others): rng.randrange(5) / 4  # with ties
            for length in range(6)
            for others in itertools.combinations(range(1, 6), length)
        }
        tried, chosen = brute_force(6, scores, sign)
        found = soup.choose_greedily(6, scores.__getitem__, direction)
        assert [score for score, _ in found] == tried
        assert tuple(i for i, (_, stays) in enumerate(found) if stays) == chosen
        sizes.add(len(chosen))
    assert len(sizes) > 3


def test_a_score_that_is_not_finite_stays_out() -> None:
    scores = {(0,): 0.5, (0, 1): math.nan, (0, 2): 0.5}
    found = soup.choose_greedily(3, scores.__getitem__, "maximise")
    assert [stays for _, stays in found] == [True, False, True]


# -- the average


def test_floats_are_averaged_and_counts_are_the_firsts() -> None:
    states = [
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([3.0, 8.0]), "n": torch.tensor(5)},
        {"w": torch.tensor([5.0, 5.0]), "n": torch.tensor(7)},
    ]
    total = None
    for state in states:
        total = soup.add_states(total, state)
    assert total is not None
    assert total["w"].tolist() == [9.0, 15.0] and total["n"].item() == 3


def test_statistics_are_estimated_as_the_mean_of_batches() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    x = torch.randn(12, 3) * 4 + 2
    norms = batch_norm.norms_with_statistics(net)
    batch_norm.estimate_statistics(net, norms, lambda: [net(part) for part in torch.split(x, 4)])
    batches = [net[0](part) for part in torch.split(x, 4)]  # dropout does nothing
    means = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    variances = torch.stack([batch.var(0) for batch in batches]).mean(0)
    norm = norms[0]
    assert norm.running_mean is not None and norm.running_var is not None
    assert torch.allclose(norm.running_mean, means, atol=1e-6)
    assert torch.allclose(norm.running_var, variances, rtol=1e-5)
    assert norm.momentum == 0.1 and not any(module.training for module in net.modules())


def test_a_soup_is_the_mean_of_its_ingredients_with_statistics_of_its_own(tmp_path: Path) -> None:
    """One ingredient froze three stages, and so has the pretrained weights and statistics there."""
    shallow, deep = trained(run(), 0, tmp_path), trained(run(freeze_depth=3, lr=0.01), 1, tmp_path)
    context = soup.prepare_common_stages(assignment_of(deep.run, tmp_path), (deep, shallow), 0)
    start = copy_state(context)
    states = [soup.read_state(context, i, start, BATCH) for i in (shallow, deep)]
    context.net.load_state_dict(start)
    soup.make_soup(context, (shallow, deep), BATCH)
    made = copy_state(context)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    weights = [name for name in made if not name.endswith(statistics)]
    assert len(weights) > 20
    for name in weights:
        assert torch.allclose(made[name], (states[0][name] + states[1][name]) / 2, atol=1e-6), name
    assert any(not torch.equal(states[0][name], states[1][name]) for name in weights)
    # the statistics are neither of an ingredient's nor their mean, but of what the soup computes
    norms = batch_norm.norms_with_statistics(context.net)
    mean = {name: (states[0][name] + states[1][name]) / 2 for name in made}
    names = [name for name in made if name.endswith("running_mean")]
    assert any(not torch.allclose(made[name], mean[name], atol=1e-3) for name in names)
    batch_norm.estimate_statistics(
        context.net, norms, lambda: run_training_examples(context, BATCH)
    )
    again = copy_state(context)
    assert all(torch.equal(again[name], made[name]) for name in names)


@pytest.mark.parametrize("recipe", [{}, {"freeze_depth": 3}, {"batchnorm": "frozen"}])
def test_an_ingredient_computes_what_its_trial_computed(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """So statistics that it froze, or stages, do not change what it adds."""
    other, mine = trained(run(), 0, tmp_path), trained(run(**recipe), 1, tmp_path)
    alone = soup.prepare_common_stages(assignment_of(mine.run, tmp_path), (mine,), 0)
    assert load_best_weights(Path(mine.weights_file), alone.staged_model.model, alone.net)
    expected = torch.cat([p for p, _ in predict_source(alone, alone.valid, BATCH)])
    context = soup.prepare_common_stages(assignment_of(mine.run, tmp_path), (mine, other), 0)
    context.net.load_state_dict(soup.read_state(context, mine, copy_state(context), BATCH))
    found = torch.cat([p for p, _ in predict_source(context, context.valid, BATCH)])
    assert torch.allclose(found, expected, atol=1e-4)
    # its statistics are those of the training examples already, also where its trial froze others
    before = copy_state(context)
    norms = batch_norm.norms_with_statistics(context.net)
    batch_norm.adopt_statistics(context.net, norms, lambda: run_training_examples(context, BATCH))
    for name, value in copy_state(context).items():
        assert torch.allclose(value, before[name], rtol=1e-3, atol=1e-4), name


def test_stages_that_all_froze_stay_behind_the_cut(tmp_path: Path) -> None:
    first = Ingredient(0, run(freeze_depth=4), "")
    second = Ingredient(1, run(freeze_depth=2), "")
    context = soup.prepare_common_stages(assignment_of(first.run, tmp_path), (first, second), 0)
    assert len(list(context.net.children())) == context.staged_model.max_depth + 1 - 2


def test_what_is_chosen_is_scored_as_the_soup_that_is_made_of_it(tmp_path: Path) -> None:
    candidates = tuple(
        trained(run(lr=lr, freeze_depth=depth), number, tmp_path)
        for number, (lr, depth) in enumerate([(0.003, 0), (0.002, 3), (0.004, 0)])
    )
    assignment = assignment_of(candidates[0].run, tmp_path)
    choice = soup.choose_soup(SoupJob(assignment, candidates), lambda _: True, 0)
    assert [number for number, _, _ in choice.tried] == [0, 1, 2] and choice.tried[0][2]
    chosen = tuple(candidates[number] for number, _, stays in choice.tried if stays)
    context = soup.prepare_common_stages(assignment, candidates, 0)
    soup.make_soup(context, chosen, BATCH)
    scores = context.task.score(predict_source(context, context.valid, BATCH))
    assert scores["accuracy"] == choice.scores["accuracy"]
    assert scores["log_loss"] == pytest.approx(choice.scores["log_loss"], abs=1e-6)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    mine = trained(run(), 0, tmp_path)
    other = replace(
        mine.run, data=PluginConfig("synthetic", {**mine.run.data.options, "classes": 4})
    )
    context = soup.prepare_common_stages(assignment_of(other, tmp_path), (mine,), 0)
    with pytest.raises(
        DataError, match=r"of trial 0 are damaged or of another model; search\.soup"
    ):
        soup.make_soup(context, (mine,), BATCH)


def test_a_complete_retraining_is_not_repeated_and_that_of_another_run_is_no_substitute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = trained(run(fit="train+valid"), 0, tmp_path)
    assert trained(run(lr=0.1, fit="train+valid"), 0, tmp_path).weights_file != mine.weights_file
    second = trained(run(), 1, tmp_path)
    monkeypatch.setattr(soup, "fit", lambda *_: pytest.fail("trained again"))
    assert trained(run(), 1, tmp_path) == second

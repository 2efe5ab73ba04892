"""A trial's head begins as its linear probe: trained once, kept, the same for every trial, and only where there are weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import Engine, Part, Run
from tuner.files.cache_entries import entries
from tuner.training import training_loop
from tuner.training.building import build
from tuner.training.devices import Place, place
from tuner.training.training_loop import fit, predictions, prepare


def run(**recipe: Any) -> Run:
    space = parsing.parse(yaml_document.parse(SMALL, "small.yaml"))
    chosen = {("recipe", "epochs"): 2, ("recipe", "lr"): 1e-3} | {
        ("recipe", k): v for k, v in recipe.items()
    }
    return space.run(chosen, seed=3)


@pytest.fixture
def here(tmp_path: Path) -> Place:
    return place(Engine(device="cpu"), tmp_path)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of examples of every epoch that is trained."""
    seen: list[int] = []
    real: Callable[..., float] = training_loop.learn

    def learn(bench: training_loop.Bench, *rest: Any) -> float:
        seen.append(len(bench.train))
        return real(bench, *rest)

    monkeypatch.setattr(training_loop, "learn", learn)
    return seen


def accuracy(bench: training_loop.Bench) -> float:
    return bench.task.score(predictions(bench, bench.valid, 16))["accuracy"]


def head(bench: training_loop.Bench) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in list(bench.staged.stages.values())[-1].state_dict().items()}


def test_a_trial_begins_where_linear_probing_ends(here: Place, trainings: list[int]) -> None:
    fresh, probed = prepare(run(head="fresh"), here, "accuracy"), prepare(run(), here, "accuracy")
    assert len(trainings) == training_loop.PROBE.epochs  # for the second alone
    assert accuracy(probed) > accuracy(fresh)
    assert not (here.home / "probes").exists() or len(entries(here.home / "probes")) == 1
    deep = prepare(run(freeze_depth=5), here, "accuracy")  # the same probe at every depth
    assert (
        all(torch.equal(v, head(probed)[k]) for k, v in head(deep).items())
        and len(trainings) == training_loop.PROBE.epochs
    )


def test_a_probe_that_was_kept_and_one_that_is_trained_again_give_equal_epochs(
    here: Place, tmp_path: Path
) -> None:
    told = []
    for home in (here, here, place(Engine(device="cpu"), tmp_path / "other")):
        told.append(
            [(e.loss, e.scores) for e in fit(prepare(run(), home, "accuracy"), run().recipe, 3)]
        )
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("harm", [b"", b"x" * 100])
def test_a_damaged_probe_is_trained_again(harm: bytes, here: Place, trainings: list[int]) -> None:
    before = head(prepare(run(), here, "accuracy"))
    (kept,) = entries(here.home / "probes")
    (kept / training_loop.PROBED).write_bytes(harm)
    after = head(prepare(run(), here, "accuracy"))
    assert len(trainings) == 2 * training_loop.PROBE.epochs and all(
        torch.equal(v, after[k]) for k, v in before.items()
    )


def test_who_learns_from_train_and_valid_has_a_probe_of_both(
    here: Place, trainings: list[int]
) -> None:
    data = prepare(run(), here, "accuracy").data
    prepare(run(fit="train+valid"), here, "accuracy")
    assert set(trainings) == {len(data.train), len(data.train) + len(data.valid)}


@pytest.mark.parametrize(
    "change",
    [{"model": Part("resnet18_slim", {"weights": "none"})}, {"recipe": run(head="fresh").recipe}],
    ids=["no weights", "fresh"],
)
def test_without_weights_or_where_the_file_says_fresh_the_head_is_as_built(
    change: dict[str, Any], here: Place, trainings: list[int]
) -> None:
    r = replace(run(), **change)
    bench = prepare(r, here, "accuracy")
    built = list(build(r, here.home, 3).stages.values())[-1].state_dict()
    assert trainings == [] and all(torch.equal(v, built[k]) for k, v in head(bench).items())

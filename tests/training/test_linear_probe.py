"""A trial's head begins as its linear probe: solved once, kept, the same for every trial, and only where there are weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, PluginConfig, Run
from tuner.files.cache_entries import list_entries
from tuner.training import linear_probe
from tuner.training.building import build_model
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import TrainingContext
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, predict_source


def run(**recipe: Any) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {("recipe", "epochs"): 2, ("recipe", "lr"): 1e-3} | {
        ("recipe", k): v for k, v in recipe.items()
    }
    return space.make_run(chosen, seed=3)


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


@pytest.fixture
def solutions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of training examples of every probe that is solved."""
    seen: list[int] = []
    real = linear_probe.solve_output_layer

    def solve(*arguments: Any, **options: Any) -> float:
        examples = len(arguments[2]) + (len(arguments[3]) if options["join_valid"] else 0)
        seen.append(examples)
        return real(*arguments, **options)

    monkeypatch.setattr(linear_probe, "solve_output_layer", solve)
    return seen


def accuracy(bench: TrainingContext) -> float:
    return bench.task.score(predict_source(bench, bench.valid, 16))["accuracy"]


def head(bench: TrainingContext) -> dict[str, torch.Tensor]:
    return {
        k: v.clone() for k, v in list(bench.staged_model.stages.values())[-1].state_dict().items()
    }


def test_a_trial_begins_where_linear_probing_ends(
    here: DeviceContext, solutions: list[int]
) -> None:
    fresh, probed = (
        prepare_training(run(head="fresh"), here, "accuracy"),
        prepare_training(run(), here, "accuracy"),
    )
    assert len(solutions) == 1  # for the second alone
    assert accuracy(probed) > accuracy(fresh)
    assert not (here.home / "probes").exists() or len(list_entries(here.home / "probes")) == 1
    deep = prepare_training(run(freeze_depth=5), here, "accuracy")  # the same probe at every depth
    assert (
        all(torch.equal(v, head(probed)[k]) for k, v in head(deep).items()) and len(solutions) == 1
    )


def test_a_probe_that_was_kept_and_one_that_is_trained_again_give_equal_epochs(
    here: DeviceContext, tmp_path: Path
) -> None:
    told = []
    for home in (here, here, select_device(EngineSettings(device="cpu"), tmp_path / "other")):
        told.append(
            [
                (progress.epoch.loss, progress.epoch.scores)
                for progress in fit(prepare_training(run(), home, "accuracy"), run().recipe, 3)
            ]
        )
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("harm", [b"", b"x" * 100])
def test_a_damaged_probe_is_trained_again(
    harm: bytes, here: DeviceContext, solutions: list[int]
) -> None:
    before = head(prepare_training(run(), here, "accuracy"))
    (kept,) = list_entries(here.home / "probes")
    (kept / linear_probe.PROBED_HEAD_FILE).write_bytes(harm)
    after = head(prepare_training(run(), here, "accuracy"))
    assert len(solutions) == 2 and all(torch.equal(v, after[k]) for k, v in before.items())


def test_who_learns_from_train_and_valid_has_a_probe_of_both(
    here: DeviceContext, solutions: list[int]
) -> None:
    data = prepare_training(run(), here, "accuracy").dataset
    prepare_training(run(fit="train+valid"), here, "accuracy")
    assert set(solutions) == {len(data.train), len(data.train) + len(data.valid)}


@pytest.mark.parametrize(
    "change",
    [
        {"model": PluginConfig("resnet18_slim", {"weights": "none"})},
        {"recipe": run(head="fresh").recipe},
    ],
    ids=["no weights", "fresh"],
)
def test_without_weights_or_where_the_file_says_fresh_the_head_is_as_built(
    change: dict[str, Any], here: DeviceContext, solutions: list[int]
) -> None:
    r = replace(run(), **change)
    bench = prepare_training(r, here, "accuracy")
    built = list(build_model(r, here.home, 3).stages.values())[-1].state_dict()
    assert solutions == [] and all(torch.equal(v, built[k]) for k, v in head(bench).items())

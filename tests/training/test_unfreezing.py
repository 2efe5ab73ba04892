"""Gradual unfreezing: a stage that waits is still, and as long as only the head is trained, so are all others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.training.devices import DeviceContext, select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


def run(**recipe: Any) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {"lr": 0.01, "optimizer": "adamw", "weight_decay": 0.1, "batchnorm": "frozen"}
    values = {("recipe", key): value for key, value in (chosen | recipe).items()}
    return space.make_run(values, seed=3)


def changed_stages(r: Run, here: DeviceContext) -> list[set[str]]:
    """The stages that changed in each epoch, their buffers included."""
    context = prepare_training(r, here, "accuracy")
    before = {name: v.clone() for name, v in context.net.state_dict().items()}
    changes = []
    for _ in fit(context, r.recipe, r.seed):
        after = {name: v.clone() for name, v in context.net.state_dict().items()}
        names = {name for name in after if not torch.equal(after[name], before[name])}
        changes.append({name.partition(".")[0] for name in names})
        before = after
    return changes


@pytest.mark.parametrize("freeze_depth", [0, 2])
def test_one_more_stage_is_trained_after_so_many_epochs(
    freeze_depth: int, here: DeviceContext
) -> None:
    r = run(unfreeze_every=2, epochs=6, fit="train+valid", freeze_depth=freeze_depth)
    names = [name for name, _ in prepare_training(r, here, "accuracy").net.named_children()]
    expected = [set(names[-count:]) for count in (1, 1, 2, 2, 3, 3)]
    assert changed_stages(r, here) == expected


def test_statistics_that_adapt_wait_too(here: DeviceContext) -> None:
    r = run(unfreeze_every=1, epochs=2, fit="train+valid", batchnorm="adapt")
    changes = changed_stages(r, here)
    assert len(changes[0]) == 6  # those of the training examples, before the first step
    assert len(changes[1]) == 2


def test_as_long_as_all_others_wait_it_is_the_deepest_freeze(here: DeviceContext) -> None:
    deepest = prepare_training(run(), here, "accuracy").staged_model.max_depth
    waiting, frozen = (
        run(unfreeze_every=2, epochs=2, freeze_depth=0),
        run(epochs=2, freeze_depth=deepest),
    )
    losses = [
        [
            progress.epoch.loss
            for progress in fit(prepare_training(r, here, "accuracy"), r.recipe, 3)
        ]
        for r in (waiting, frozen)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

"""The laws of stillness, memory and start for every task, over a tiny member of it: see docs/design.md."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.tiny_tasks import TINY_TASKS, TinyTask
from tuner.config import plugins
from tuner.config.run import Run
from tuner.training.epoch import TrainingContext, predict_source
from tuner.training.training_loop import fit

ADAPTERS = "recipe.lora={rank: 2}"
SLOW = (
    "detection",
    "instance_segmentation",
    "segmentation",
    "text_classification",
    "text_generation",
)


# each task but classification, which test_laws.py and test_start.py have; and adapters
CASES: list[Any] = [
    *(
        pytest.param(name, (), id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in TINY_TASKS
        if name != "classification"
    ),
    pytest.param("text_classification", (ADAPTERS,), id="adapters"),
]


def prepare(
    name: str, folder: Path, cache: str, *words: str
) -> tuple[TinyTask, Run, TrainingContext]:
    """The training of a task with its first stage frozen, and without dropout."""
    if ADAPTERS in words:
        pytest.importorskip("peft")
    tiny = TINY_TASKS[name]
    recipe = ("recipe.freeze_depth=1", "recipe.head=probe", "recipe.batchnorm=frozen")
    run = tiny.make_run(folder, *recipe, *words)
    context = tiny.prepare(run, folder / "home", "cpu", cache=cache)
    for module in context.net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return tiny, run, context


@pytest.mark.parametrize(("name", "words"), CASES)
def test_a_task_trains_alike_from_the_cache_and_its_frozen_stage_stays_still(
    name: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    losses, scores = [], []
    for cache, kind in (("always", "CachedSource"), ("never", "UncachedSource")):
        epochs = f"recipe.epochs={1 if name in SLOW else 2}"
        tiny, run, context = prepare(name, tmp_path, cache, epochs, "recipe.lr=1e-5", *words)
        assert type(context.train).__name__ == kind
        prefix, _ = context.staged_model.split(1)
        still = {key: value.clone() for key, value in prefix.state_dict().items()}
        moving = {key: value.clone() for key, value in context.net.state_dict().items()}
        seen = [progress.epoch for progress in fit(context, run.recipe, run.seed)]
        assert all(torch.equal(value, still[key]) for key, value in prefix.state_dict().items())
        after = context.net.state_dict()
        assert any(not torch.equal(value, after[key]) for key, value in moving.items())
        losses.append([epoch.loss for epoch in seen])
        scores.append([epoch.scores[tiny.metric] for epoch in seen])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert scores[0] == pytest.approx(scores[1], abs=2e-2)


# objects of a new head have nearly equal scores, so rounding reorders them: test_start.py has these
BEGINNERS = [case for case in CASES if case.id not in ("detection", "instance_segmentation")]


@pytest.mark.parametrize(("name", "words"), BEGINNERS)
def test_a_task_begins_where_its_head_begins(
    name: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    tiny, run, context = prepare(name, tmp_path, "always", "recipe.lr=1e-9", *words)
    before = context.task.score(predict_source(context, context.valid, 4))
    (progress,) = fit(context, run.recipe, run.seed)
    assert progress.epoch.scores[tiny.metric] == pytest.approx(before[tiny.metric], abs=1e-3)
    # it counts in bins, and a probability at the border of one changes it by an eighth by rounding
    scores, started = (
        {key: value for key, value in found.items() if key != "expected_calibration_error"}
        for found in (progress.epoch.scores, before)
    )
    assert scores == pytest.approx(started, rel=1e-2, abs=1e-2)


def test_every_task_has_a_tiny_member() -> None:
    assert set(TINY_TASKS) == set(plugins.list_names("task"))

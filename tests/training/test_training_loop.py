"""`prepare` and `fit`: what a recipe means, that equal seeds repeat, and that the weights kept are the best epoch's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, PluginConfig, Recipe, Run
from tuner.errors import SpaceError, StorageError
from tuner.messages import Epoch
from tuner.training import training_loop
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import Diverged
from tuner.training.optimizers import lr_factor, make_optimizer
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, predict_source, shuffle_into_batches


def run(**recipe: Any) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {("recipe", "epochs"): 2, ("recipe", "lr"): 0.01} | {
        ("recipe", k): v for k, v in recipe.items()
    }
    return space.make_run(chosen, seed=3)


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


def epochs(r: Run, here: DeviceContext) -> tuple[list[Epoch], training_loop.TrainingContext]:
    bench = prepare_training(r, here, "accuracy")
    return [progress.epoch for progress in fit(bench, r.recipe, r.seed)], bench


def told(found: list[Epoch]) -> list[tuple[int, float, dict[str, float]]]:
    return [(e.number, e.loss, e.scores) for e in found]


def test_equal_seeds_give_equal_epochs_and_other_seeds_others(here: DeviceContext) -> None:
    first, again, other = (told(epochs(replace(run(), seed=seed), here)[0]) for seed in (3, 3, 4))
    assert first == again != other


def test_the_weights_kept_are_the_best_epochs_and_not_the_last(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = run(epochs=3, lr=0.02)
    bench = prepare_training(r, here, "accuracy")
    true_score = bench.task.score
    scripted: Iterator[float] = iter([0.3, 0.9, 0.5])
    monkeypatch.setattr(
        bench.task, "score", lambda pairs: true_score(pairs) | {"accuracy": next(scripted)}
    )
    best = None
    seen = []
    for progress in fit(bench, r.recipe, r.seed):
        best = progress.best
        seen.append({k: v.clone() for k, v in bench.net.state_dict().items()})
    assert best is not None and best.epoch.number == 2
    kept = bench.net.state_dict()
    assert all(torch.equal(kept[k], seen[1][k]) for k in kept)
    assert any(not torch.equal(kept[k], seen[2][k]) for k in kept)
    again = [p for p, _ in predict_source(bench, bench.valid, r.recipe.batch_size)]
    assert torch.allclose(torch.cat(again), torch.cat([p for p, _ in best.predictions]))


def test_patience_stops_after_so_many_epochs_without_a_better_score(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = run(epochs=9, patience=2)
    bench = prepare_training(r, here, "accuracy")
    scripted = iter([0.5, 0.6, 0.6, 0.4, 0.9])
    monkeypatch.setattr(bench.task, "score", lambda pairs: {"accuracy": next(scripted)})
    assert [progress.epoch.number for progress in fit(bench, r.recipe, r.seed)] == [1, 2, 3, 4]


def test_of_a_minimised_metric_the_lowest_epoch_is_the_best(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = run(epochs=9, patience=2)
    bench = prepare_training(r, here, "log_loss", "minimise")
    scripted = iter([0.6, 0.5, 0.5, 0.7, 0.1])
    monkeypatch.setattr(bench.task, "score", lambda pairs: {"log_loss": next(scripted)})
    *_, last = fit(bench, r.recipe, r.seed)
    assert last.epoch.number == 4 and last.best is not None
    assert (last.best.epoch.number, last.best.epoch.scores) == (2, {"log_loss": 0.5})


def test_stop_epoch_ends_early_on_the_same_schedule(here: DeviceContext) -> None:
    whole, _ = epochs(run(epochs=3, schedule="cosine"), here)
    early, _ = epochs(run(epochs=3, schedule="cosine", stop_epoch=2), here)
    assert told(early) == told(whole)[:2]


def test_train_and_valid_learns_from_both_and_keeps_the_last_epoch(here: DeviceContext) -> None:
    found, bench = epochs(run(fit="train+valid"), here)
    assert len(bench.train) == len(bench.dataset.train) + len(bench.dataset.valid)
    assert [e.scores for e in found] == [{}, {}]


def test_a_loss_that_is_not_finite_ends_the_training(here: DeviceContext) -> None:
    r = replace(
        run(lr=100.0, epochs=9, optimizer="sgd"),
        model=PluginConfig("tests.helpers.jobs:linear", {}),
    )
    with pytest.raises(Diverged, match=r"loss .*(nan|inf) (at step [0-9]+ )?in epoch [0-9]"):
        epochs(r, here)


def test_a_freeze_depth_beyond_the_model_is_named(here: DeviceContext) -> None:
    with pytest.raises(SpaceError, match=r"recipe.freeze_depth: 6, but resnet18_slim allows 0..5"):
        prepare_training(run(freeze_depth=6), here, "accuracy")


@pytest.mark.parametrize(
    ("length", "size", "counts"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (3, 8, [3]), (1, 8, [1]), (8, 4, [4, 4])],
)
def test_batches_cover_every_example_once_and_none_has_one_alone(
    length: int, size: int, counts: list[int]
) -> None:
    chunks = shuffle_into_batches(length, size, seed=0, epoch=1)
    assert [len(c) for c in chunks] == counts
    assert sorted(torch.cat(chunks).tolist()) == list(range(length))


def test_batches_differ_by_epoch_and_repeat_by_seed() -> None:
    one, same, two = (
        torch.cat(shuffle_into_batches(50, 8, seed=1, epoch=e)).tolist() for e in (1, 1, 2)
    )
    assert one == same != two


def test_a_last_batch_of_one_trains_with_batch_norm(here: DeviceContext) -> None:
    r = run(epochs=1)
    count = len(prepare_training(r, here, "accuracy").train)
    assert len(epochs(run(epochs=1, batch_size=count - 1), here)[0]) == 1


@pytest.mark.parametrize(
    ("recipe", "step", "expected"),
    [
        (Recipe(schedule="constant", warmup=0.0), 0, 1.0),
        (Recipe(schedule="cosine", warmup=0.0), 0, 1.0),
        (Recipe(schedule="cosine", warmup=0.0), 50, 0.5),
        (Recipe(schedule="cosine"), 100, 0.0),
        (Recipe(warmup=0.1), 0, 1 / 11),
        (Recipe(warmup=0.1), 9, 10 / 11),
        (Recipe(warmup=0.1), 10, 1.0),
        (Recipe(warmup=0.1, schedule="cosine"), 55, 0.5),
    ],
)
def test_the_schedule(recipe: Recipe, step: int, expected: float) -> None:
    assert lr_factor(recipe, step, 100) == pytest.approx(expected)


def test_optimizers_get_what_the_recipe_says() -> None:
    weight = [torch.nn.Parameter(torch.zeros(1))]
    sgd = make_optimizer(
        weight, Recipe(optimizer="sgd", lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01)
    ).defaults
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (
        0.1,
        0.8,
        True,
        0.01,
    )
    adamw = make_optimizer(weight, Recipe(optimizer="adamw", momentum=0.8)).defaults
    assert adamw["betas"] == (0.8, 0.999)


def test_label_smoothing_reaches_the_loss(here: DeviceContext) -> None:
    plain, smooth = (epochs(run(epochs=1, label_smoothing=s), here)[0][0].loss for s in (0.0, 0.3))
    assert plain != smooth


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        StorageError, match=r"engine.device: cuda:1, but torch .* sees no GPU here; use auto or cpu"
    ):
        select_device(EngineSettings(device="cuda:1"), tmp_path)


@pytest.mark.gpu
def test_training_on_a_gpu_matches_the_cpu(tmp_path: Path) -> None:
    r = run(epochs=1)
    cpu, gpu = (
        epochs(r, select_device(EngineSettings(device=d, precision="float32"), tmp_path))[0][0]
        for d in ("cpu", "cuda")
    )
    assert gpu.loss == pytest.approx(cpu.loss, rel=1e-2)

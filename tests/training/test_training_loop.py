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
from tuner.training.epoch import Diverged, group_batches
from tuner.training.micro_batches import check_batch_size
from tuner.training.optimizers import OPTIMIZERS, lr_factor, make_optimizer, make_schedule
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import (
    fit,
    predict_source,
    shuffle_into_batches,
)


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
        (Recipe(schedule="linear", warmup=0.2), 60, 0.5),
        (Recipe(schedule="polynomial", warmup=0.0), 25, 0.75**0.9),
        (Recipe(schedule="polynomial", warmup=0.0), 100, 0.0),
        (Recipe(schedule="onecycle", warmup=0.3), 0, 0.04),
        (Recipe(schedule="onecycle", warmup=0.3), 15, 0.52),
        (Recipe(schedule="onecycle", warmup=0.3), 30, 1.0),
        (Recipe(schedule="onecycle", warmup=0.3), 65, 0.5),
        (Recipe(schedule="linear", warmup=0.0, min_lr=0.1), 50, 0.55),
        (Recipe(schedule="cosine", warmup=0.0, min_lr=0.1), 100, 0.1),
        (Recipe(schedule="polynomial", warmup=0.0, min_lr=0.1), 100, 0.1),
        (Recipe(schedule="onecycle", min_lr=0.1), 100, 0.1),
        (Recipe(schedule="constant", warmup=0.0, min_lr=0.1), 100, 1.0),
        (Recipe(warmup=10, schedule="cosine"), 9, 10 / 11),
        (Recipe(warmup=10, schedule="cosine"), 55, 0.5),
        (Recipe(warmup=1, schedule="cosine"), 0, 1 / 2),
        (Recipe(warmup=0, schedule="cosine"), 0, 1.0),
        (Recipe(warmup=5000, schedule="linear"), 50, 1.0),  # cut at half of the steps
        (Recipe(warmup=5000, schedule="linear"), 49, 50 / 51),
    ],
)
def test_the_schedule(recipe: Recipe, step: int, expected: float) -> None:
    assert lr_factor(recipe, step, 100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recipe", "kind", "expected"),
    [
        (
            {"optimizer": "sgd", "momentum": 0.8, "nesterov": True},
            torch.optim.SGD,
            {"momentum": 0.8, "nesterov": True},
        ),
        (
            {"optimizer": "sgd", "momentum": 0.0, "nesterov": True},
            torch.optim.SGD,
            {"momentum": 0.0, "nesterov": False},
        ),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
        (
            {"optimizer": "adam", "momentum": 0.8, "beta2": 0.99, "epsilon": 1e-6},
            torch.optim.Adam,
            {"betas": (0.8, 0.99), "eps": 1e-6},
        ),
        ({"optimizer": "nadam"}, torch.optim.NAdam, {"decoupled_weight_decay": True}),
        ({"optimizer": "radam"}, torch.optim.RAdam, {"decoupled_weight_decay": True}),
        ({"optimizer": "adamax", "beta2": 0.9}, torch.optim.Adamax, {"betas": (0.9, 0.9)}),
        ({"optimizer": "adagrad", "epsilon": 1e-6}, torch.optim.Adagrad, {"eps": 1e-6}),
        (
            {"optimizer": "rmsprop", "momentum": 0.5, "beta2": 0.95},
            torch.optim.RMSprop,
            {"momentum": 0.5, "alpha": 0.95, "eps": 1e-8},
        ),
        ({"optimizer": "rmsprop"}, torch.optim.RMSprop, {"alpha": 0.99}),
        (
            {"optimizer": "adadelta", "beta2": 0.8, "epsilon": 1e-5},
            torch.optim.Adadelta,
            {"rho": 0.8, "eps": 1e-5},
        ),
        ({"optimizer": "adadelta"}, torch.optim.Adadelta, {"rho": 0.9, "eps": 1e-6}),
        ({"optimizer": "adafactor"}, torch.optim.Adafactor, {}),
    ],
)
def test_optimizers_get_what_the_recipe_says(
    recipe: dict[str, Any], kind: type, expected: dict[str, Any]
) -> None:
    optimizer = make_optimizer(
        torch.nn.Linear(1, 1, bias=False), Recipe(lr=0.1, weight_decay=0.01, **recipe)
    )
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and (group["lr"], group["weight_decay"]) == (0.1, 0.01)
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name: str, here: DeviceContext) -> None:
    lr = {"sgd": 0.01, "adagrad": 0.005, "adadelta": 0.3}.get(name, 0.001)
    recipe = {"lr": lr, "epochs": 3, "freeze_depth": 4, "head": "fresh", "fit": "train+valid"}
    found, _ = epochs(run(optimizer=name, **recipe), here)
    assert found[-1].loss < found[0].loss


def test_the_momentum_of_onecycle_falls_while_the_rate_rises(here: DeviceContext) -> None:
    for name, key in (("sgd", "momentum"), ("adamw", "betas"), ("rmsprop", "momentum")):
        recipe = Recipe(optimizer=name, schedule="onecycle", momentum=0.95, warmup=0.5)
        optimizer = make_optimizer(torch.nn.Linear(1, 1), recipe)
        schedule = make_schedule(optimizer, recipe, 4)
        seen = []
        for _ in range(4):
            optimizer.step()
            value = optimizer.param_groups[0][key]
            seen.append(value[0] if key == "betas" else value)
            schedule.step()
        assert seen == pytest.approx([0.95, 0.9, 0.85, 0.9])
    plain, cycled = (epochs(run(schedule=s), here)[0][-1].loss for s in ("cosine", "onecycle"))
    assert plain != cycled


@pytest.mark.parametrize(
    "recipe", [{"batch_size": 4, "accumulate": 3}, {"batch_size": 3, "accumulate": 4}]
)
def test_accumulated_batches_are_one_batch(recipe: dict[str, Any], here: DeviceContext) -> None:
    """Without BatchNorm, up to rounding; the schedule counts the steps of the optimizer."""
    model = PluginConfig("tests.helpers.jobs:linear", {})
    whole = replace(run(batch_size=12, optimizer="sgd", momentum=0.9), model=model)
    accumulated = replace(run(optimizer="sgd", momentum=0.9, **recipe), model=model)
    (expected, net), (found, same) = (epochs(r, here) for r in (whole, accumulated))
    assert [e.loss for e in found] == pytest.approx([e.loss for e in expected], rel=1e-5)
    for name, value in net.net.state_dict().items():
        assert torch.allclose(same.net.state_dict()[name], value, atol=1e-6)
    batches = list(torch.arange(7))
    assert group_batches(batches, 3) == [batches[:3], batches[3:6], batches[6:]]


def test_steps_are_counted_as_the_optimizer_takes_them(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch of 10 batches by 4 is 3 steps; at the end of the schedule the rate is 0."""
    r = run(batch_size=4, accumulate=4, epochs=2, schedule="linear", warmup=0.0)
    context = prepare_training(r, here, "accuracy")
    training = training_loop.start_training(context, r.recipe, r.seed)
    steps = -(-len(shuffle_into_batches(len(context.train), 4, 3, 1)) // 4)
    for number in (1, 2):
        training_loop.train_one_epoch(context, r.recipe, training, r.seed, number)
        assert training.schedule.last_epoch == steps * number
    assert training.optimizer.param_groups[0]["lr"] == 0


def test_more_accumulated_batches_than_there_are_is_a_warning(here: DeviceContext) -> None:
    dataset = prepare_training(run(), here, "accuracy").dataset
    assert check_batch_size(dataset, run(batch_size=4, accumulate=2)) == []
    assert check_batch_size(dataset, run(batch_size=4, accumulate=50)) == [
        f"recipe.accumulate: 50 batches of 4, but there are {len(dataset.train)} training "
        "examples; each epoch is one step"
    ]


def test_an_epoch_is_validated_when_it_is_due_and_the_last_always(here: DeviceContext) -> None:
    r = run(epochs=5, validate_every=2, freeze_depth=5, head="fresh")
    found = epochs(r, here)[0]
    every = epochs(run(epochs=5, freeze_depth=5, head="fresh"), here)[0]
    assert [bool(epoch.scores) for epoch in found] == [False, True, False, True, True]
    assert [epoch.loss for epoch in found] == [epoch.loss for epoch in every]
    assert all(a.scores in ({}, b.scores) for a, b in zip(found, every, strict=True))


def test_patience_looks_at_validated_epochs(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch 2 is the best; 3 epochs later none was validated, so it goes on to epoch 6."""
    r = run(epochs=8, validate_every=2, patience=3, freeze_depth=5, head="fresh")
    bench = prepare_training(r, here, "accuracy")
    scripted = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(bench.task, "score", lambda pairs: {"accuracy": next(scripted)})
    assert [p.epoch.number for p in fit(bench, r.recipe, r.seed)][-1] == 6


def test_gradients_that_are_clipped_to_almost_nothing_train_almost_nothing(
    here: DeviceContext,
) -> None:
    plain, clipped = (
        epochs(run(optimizer="sgd", head="fresh", clip_norm=norm), here)[1].net.state_dict()
        for norm in (None, 1e-9)
    )
    start = prepare_training(run(optimizer="sgd", head="fresh"), here, "accuracy").net.state_dict()
    weights = [name for name, tensor in start.items() if tensor.ndim > 1]  # BatchNorm adapts
    assert all(torch.allclose(clipped[name], start[name], atol=1e-6) for name in weights)
    assert not any(torch.allclose(plain[name], start[name], atol=1e-6) for name in weights)


@pytest.mark.parametrize(("share", "depth"), [(0.0, 0), (0.4, 2), (1.0, 5)])
def test_a_share_of_the_stages_freezes_as_many(
    share: float, depth: int, here: DeviceContext
) -> None:
    shared = prepare_training(run(freeze=share, freeze_depth=0), here, "accuracy")
    counted = prepare_training(run(freeze_depth=depth), here, "accuracy")
    assert [name for name, _ in shared.net.named_children()] == [
        name for name, _ in counted.net.named_children()
    ]


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

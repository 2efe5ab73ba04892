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


def test_the_solved_layer_is_as_good_as_scikit_learns_logistic_regression() -> None:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 64 + 5, torch.from_numpy(labels)  # small and far off
    train = linear_probe.LayerExamples(x[:1000], y[:1000])
    valid = linear_probe.LayerExamples(x[1000:1400], y[1000:1400])
    layer = torch.nn.Linear(64, 10)
    linear_probe.solve_output_layer(
        layer,
        lambda net, batch: torch.nn.functional.cross_entropy(net(batch.x), batch.y),
        train,
        valid,
    )
    with torch.no_grad():
        accuracy = float((layer(x[1400:]).argmax(1) == y[1400:]).float().mean())
    theirs = LogisticRegression(max_iter=5000).fit(pixels[:1000], labels[:1000])
    assert accuracy > theirs.score(pixels[1400:], labels[1400:]) - 0.02


def test_a_head_that_the_user_has_trained_is_left_alone(
    here: DeviceContext, tmp_path: Path, solutions: list[int]
) -> None:
    from safetensors.torch import save_file

    staged = build_model(run(), here.home, 3)
    state = {k: v.contiguous() for k, v in staged.model.state_dict().items()}
    save_file(state, tmp_path / "own.safetensors")
    weights = {"weights": str(tmp_path / "own.safetensors")}
    own = replace(run(), model=PluginConfig("resnet18_slim", weights))
    kept = head(prepare_training(own, here, "accuracy"))
    assert solutions == []
    assert torch.equal(kept["0.weight"], state["fc.weight"])


@pytest.mark.parametrize("change", ["data.views=null", "engine"])
def test_the_probe_costs_one_pass_over_the_images_whatever_the_mode(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["data.augment=flip", "data.views=null"] if change == "data.views=null" else []
    cache = "never" if change == "engine" else "auto"
    here = select_device(EngineSettings.model_validate({"device": "cpu", "cache": cache}), tmp_path)
    document = parsing.apply_overrides(yaml_document.parse_document(SMALL, "small.yaml"), words)
    chosen = {("recipe", "epochs"): 2, ("recipe", "lr"): 1e-3, ("recipe", "freeze_depth"): 0}
    small = parsing.parse_space(document).make_run(chosen, seed=3)
    counted: list[int] = []
    real = torch.nn.Conv2d.forward

    def count(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if self.in_channels == 3:
            counted.append(len(x))
        return real(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", count)
    context = prepare_training(small, here, "accuracy")
    examples = len(context.dataset.train) + len(context.dataset.valid)
    assert sum(counted) <= examples + 40  # and a few to look at shapes and costs

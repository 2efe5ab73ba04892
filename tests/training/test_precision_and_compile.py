"""float16 with a scaled loss, and a compiled suffix: trained on the CPU through the same code as on a GPU."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import SMALL
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.core.module_digests import module_digest
from tuner.training import checkpoints
from tuner.training.devices import DeviceContext, select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, open_checkpoints, start_training

CPU = torch.device("cpu")


def run(**recipe: Any) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {"epochs": 3, "lr": 0.01, "freeze_depth": 4, "optimizer": "sgd", "momentum": 0.9}
    return space.make_run({("recipe", k): v for k, v in (chosen | recipe).items()}, seed=3)


def place(home: Path, **engine: Any) -> DeviceContext:
    return select_device(EngineSettings(device="cpu", **engine), home)


def attempt(r: Run, where: DeviceContext, folder: Path | None, most: int | None) -> list[Any]:
    context = prepare_training(r, where, "accuracy")
    kept = open_checkpoints(r, context, folder)
    told = [
        [p.epoch.number, p.epoch.loss, p.epoch.scores]
        for p in islice(fit(context, r.recipe, r.seed, kept), most)
    ]
    return [told, module_digest(context.net)]


@pytest.mark.slow
def test_float16_learns_as_float32_and_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MIN_WRITE_SECONDS", 0.0)
    r, half = run(clip_norm=1.0), place(tmp_path, precision="float16")
    straight = attempt(r, half, None, None)
    attempt(r, half, tmp_path / "kept", 1)
    assert attempt(r, half, tmp_path / "kept", None) == straight
    plain = attempt(r, place(tmp_path), None, None)
    assert abs(straight[0][-1][1] - plain[0][-1][1]) < 0.05


def test_a_step_with_gradients_that_are_not_finite_is_left_out_and_the_scale_halved(
    tmp_path: Path,
) -> None:
    r = run(clip_norm=1.0)
    context = prepare_training(r, place(tmp_path, precision="float16"), "accuracy")
    training = start_training(context, r.recipe, r.seed)
    assert training.scaler is not None
    weight = next(iter(context.net.parameters()))
    before, scale = weight.detach().clone(), training.scaler.get_scale()
    training.backward((weight.float() * float("inf")).sum())
    training.step(r.recipe.clip_norm)
    assert torch.equal(weight, before) and training.scaler.get_scale() == scale / 2
    training.optimizer.zero_grad()
    training.backward(weight.float().sum() / 100)
    training.step(r.recipe.clip_norm)
    assert not torch.equal(weight, before) and training.schedule.last_epoch == 2
    _, values = checkpoints.collect_state(training)
    again = start_training(context, r.recipe, r.seed)
    tensors, _ = checkpoints.collect_state(training)
    checkpoints.restore_state(again, tensors, values)
    assert again.scaler is not None and again.scaler.get_scale() == scale / 2


def test_with_another_precision_no_loss_is_scaled(tmp_path: Path) -> None:
    r = run()
    for precision in ("float32", "bfloat16"):
        context = prepare_training(r, place(tmp_path, precision=precision), "accuracy")
        training = start_training(context, r.recipe, r.seed)
        assert training.scaler is None and "scaler" not in checkpoints.collect_state(training)[1]


def test_the_suffix_is_compiled_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []

    def compile_module(self: nn.Module) -> None:
        compiled.append(self)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    context = prepare_training(run(), place(tmp_path, compile="suffix"), "accuracy")
    assert compiled == [context.net]
    prepare_training(run(), place(tmp_path), "accuracy")
    assert len(compiled) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_suffix_trains_as_a_plain_one(tmp_path: Path) -> None:
    r = run(epochs=2)
    plain, compiled = (
        attempt(r, place(tmp_path, compile=kind), None, None)[0] for kind in ("none", "suffix")
    )
    for a, b in zip(plain, compiled, strict=True):
        assert abs(a[1] - b[1]) < 1e-3 and a[2].keys() == b[2].keys()

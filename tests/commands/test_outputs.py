"""What is done with a model's outputs: its probabilities are calibrated, and mirror images averaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import CommandResult
from tuner.core.output_modules import average_with_mirror
from tuner.manifest import PublishedExport, read_export
from tuner.search import storage
from tuner.tasks._classification import Classifier
from tuner.tasks._classification_scores import classification_scores
from tuner.tasks.classification import Classification
from tuner.training import finalization
from tuner.training.building import load_dataset
from tuner.training.exported_models import open_export

Tuner = Callable[..., CommandResult]
NEW_KEYS = ("calibrate", "temperature", "test_flips")


def published(folder: Path) -> PublishedExport:
    export = read_export(folder)
    assert export is not None
    return export


def test_examples(export: PublishedExport, home: Path) -> tuple[Tensor, Tensor]:
    """The test examples as an export takes them, and their classes."""
    data = load_dataset(export.run, home)
    x, y = data.test.take(torch.arange(len(data.test)), 0)
    images = data.input_spec.to_export_input(x)
    assert isinstance(images, Tensor) and isinstance(y, Tensor)
    return images, y


test_examples.__test__ = False  # type: ignore[attr-defined]


def trial_of(study: Path, number: int) -> optuna.trial.FrozenTrial:
    loaded = optuna.load_study(study_name="small", storage=storage.open_storage(None, study))
    return loaded.get_trials()[number]


@torch.no_grad()
def test_the_export_divides_its_logits_by_the_temperature_of_its_trial(
    studied: Path, tmp_path: Path
) -> None:
    export = published(studied / "export")
    m = export.manifest
    temperature = trial_of(studied, m["trial"]).user_attrs["temperature"]
    assert m["temperature"] == temperature != 1
    best = yaml.safe_load((studied / "best.yaml").read_text())
    assert best["search"]["calibrate"] == temperature
    weights = load_file(studied / "export/model.safetensors")
    assert float(weights["tuner.temperature"]) == pytest.approx(temperature)
    x, y = test_examples(export, tmp_path)
    logits = open_export(export, "safetensors")(x)
    assert isinstance(logits, Tensor)
    scaled, unscaled = (classification_scores(z, y) for z in (logits, logits * temperature))
    for name in ("log_loss", "expected_calibration_error", "accuracy"):
        assert m["scores"]["test"][name] == pytest.approx(scaled[name], abs=1e-5)
    assert scaled["accuracy"] == unscaled["accuracy"]
    assert abs(scaled["log_loss"] - unscaled["log_loss"]) > 1e-4
    assert f"by the temperature {temperature:g}" in (studied / "export/MODEL_CARD.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["torch_export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_every_format_has_it_and_needs_no_training(
    kind: str, tuner: Tuner, studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = published(studied / "export").manifest
    monkeypatch.setattr(finalization, "fit", lambda *_: pytest.fail("trained again"))
    said = tuner("export", "small", "--format", kind)
    assert said.code == 0, said.err
    export = published(studied / "export")
    assert all(export.manifest[key] == before[key] for key in (*NEW_KEYS, "scores"))
    x, _ = test_examples(export, tmp_path)
    first, second = (open_export(export, name)(x) for name in ("safetensors", kind))
    assert torch.allclose(first, second, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick_program")
def test_a_study_of_an_earlier_version_stays_as_it_is(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small.parent / "studies/small"
    with monkeypatch.context() as patched:  # its trials have no temperature, and its manifest
        patched.setattr(Classifier, "fit_temperature", lambda *_: None)
        assert tuner("run", small, "search.trials=1").code == 0
    m = json.loads((study / "export/manifest.json").read_text())
    earlier = {key: value for key, value in m.items() if key not in NEW_KEYS}
    (study / "export/manifest.json").write_text(json.dumps(earlier))
    assert "tuner.temperature" not in load_file(study / "export/model.safetensors")
    monkeypatch.setattr(finalization, "fit", lambda *_: pytest.fail("trained again"))
    assert "nothing left to do" in tuner("run", small, "search.trials=1").out
    said = tuner("export", "small", "--format", "torch_export")
    assert said.code == 0, said.err
    assert published(study / "export").manifest["temperature"] is None
    Image.new("RGB", (32, 32)).save(small.parent / "new.png")
    assert tuner("predict", "small", "new.png").code == 0


def test_calibrate_none_leaves_the_logits_as_they_are(
    tuner: Tuner, small: Path, studied: Path
) -> None:
    before = published(studied / "export").manifest
    said = tuner("run", small, "search.trials=2", "search.calibrate=none")
    assert said.code == 0, said.err
    after = published(studied / "export").manifest
    assert before["temperature"] is not None and after["temperature"] is None
    assert "tuner.temperature" not in load_file(studied / "export/model.safetensors")
    scores = [m["scores"]["test"] for m in (before, after)]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert scores[0]["log_loss"] != scores[1]["log_loss"]
    assert "by the temperature" not in (studied / "export/MODEL_CARD.md").read_text()


def test_one_run_is_calibrated_where_it_validates(
    tuner: Tuner, studied: Path, tmp_path: Path
) -> None:
    """The trial's training again: so the temperature is the trial's."""
    m = published(studied / "export").manifest
    best = trial_of(studied, m["trial"]).user_attrs["best_epoch"]
    length = ("recipe.epochs=3", f"recipe.stop_epoch={best}")  # of a trial of `small`
    words = ("recipe.fit=train", *length, "search.calibrate=temperature", "--out")
    said = tuner("train", studied / "best.yaml", *words, tmp_path / "one")
    assert said.code == 0, said.err
    assert published(tmp_path / "one").manifest["temperature"] == m["temperature"]
    blind = tuner("train", studied / "best.yaml", words[-2], "--out", tmp_path / "blind")
    assert blind.code == 0  # it learns from train and validation examples
    assert published(tmp_path / "blind").manifest["temperature"] is None


def test_flips_are_in_the_test_score_and_in_predictions(
    tuner: Tuner, studied: Path, tmp_path: Path
) -> None:
    plain = published(studied / "export").manifest["scores"]["test"]
    said = tuner("train", studied / "best.yaml", "search.test_flips=true", "--out", "flipped")
    assert said.code == 0, said.err
    export = published(tmp_path / "flipped")
    m = export.manifest
    assert m["test_flips"] is True and "--no-flips" in (export.folder / "MODEL_CARD.md").read_text()
    x, y = test_examples(export, tmp_path)
    function = open_export(export, "safetensors")
    task = Classification(tuple(m["classes"]), 0.0)
    with torch.no_grad():
        logits = average_with_mirror(function, task.mirror_output)(x)
        expected = function(x[:1])[0].softmax(0).tolist()  # type: ignore[index]
    assert isinstance(logits, Tensor)
    found = m["scores"]["test"]["log_loss"]
    assert found == pytest.approx(classification_scores(logits, y)["log_loss"], abs=1e-5)
    assert abs(found - plain["log_loss"]) > 1e-5
    pixels = (255 * x[0]).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "new.png")

    def classes(*words: object) -> dict[str, float]:
        told: dict[str, Any] = json.loads(tuner("predict", *words, "new.png", "--json").out)
        return {name: told["classes"][name] for name in m["classes"]}

    as_tested, alone = classes("flipped"), classes("flipped", "--no-flips")
    assert list(as_tested.values()) == pytest.approx(logits[0].softmax(0).tolist(), abs=1e-5)
    assert list(alone.values()) == pytest.approx(expected, abs=1e-5)
    assert as_tested != alone and classes("flipped", "--flips") == as_tested
    assert classes("small", "--flips") == pytest.approx(as_tested, abs=1e-5)  # the same model

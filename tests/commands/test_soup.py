"""`search.soup`: a soup that is taken, one that is not, and what later commands make of both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from tests.conftest import CommandResult
from tuner.commands.export import load_study_space
from tuner.commands.run import kept_count
from tuner.commands.soup import is_current, soup_candidates
from tuner.config.run import ConfirmSettings, SearchSettings
from tuner.manifest import describe_soup, read_export
from tuner.search import history, storage
from tuner.training import finalization, soup

Tuner = Callable[..., CommandResult]

# Nine validation examples, and a loss that the average of the two best trials lowers by a fifth.
SPACE = """
task: classification
data: {name: synthetic, examples: 60, classes: 3, size: 32, noise: 2}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: adamw, lr: [0.001, 0.002, 0.003], freeze_depth: 4, epochs: 1, batch_size: 16}
search: {trials: 3, seed: 0, metric: log_loss, confirm: none, soup: greedy}
engine: {name: inline, device: cpu}
export: [safetensors]
"""
EXPLODING = ("recipe.lr=[0.001,0.1,30.0]", "recipe.optimizer=sgd", "search.compare=none")


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "studies" / "s"


@pytest.fixture
def taken(tuner: Tuner, space: Path, study: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished study whose export is a soup: run once, a copy for each test.

    What the command printed.
    """
    original = tmp_path_factory.getbasetemp() / "taken_soup"
    if not original.exists():
        said = tuner("run", space)
        assert said.code == 0, said.err
        shutil.copytree(study, original)
        original.with_suffix(".out").write_text(said.out)
    else:
        shutil.copytree(original, study)
    return original.with_suffix(".out").read_text()


def manifest(study: Path) -> dict[str, Any]:
    published = read_export(study / "export")
    assert published is not None
    return published.manifest


def open_study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=storage.open_storage(None, folder))


def forbid_training(patched: pytest.MonkeyPatch) -> None:
    for module, name in (
        (soup, "choose_soup"),
        (soup, "retrain_ingredient"),
        (finalization, "train_winner"),
    ):
        patched.setattr(module, name, lambda *_: pytest.fail("chosen or trained again"))


def test_a_soup_that_validation_takes_is_what_is_exported(taken: str, study: Path) -> None:
    m = manifest(study)
    findings = m["soup"]
    staying = [entry["trial"] for entry in findings["tried"] if entry["stays"]]
    assert findings["taken"] and len(staying) > 1 and m["trial"] == staying[0]
    assert findings["score"] < findings["winner_score"]  # log loss
    winner = history.best_trial(open_study(study))[0]
    assert winner.number == m["trial"]
    assert findings["winner_score"] == pytest.approx(winner.value, rel=1e-4)
    assert m["scores"]["valid"]["log_loss"] == findings["score"]
    sentence = describe_soup(m)
    assert sentence is not None and sentence.startswith(f"soup of trials {staying[0]}, ")
    assert f"\nweights  {sentence}\n" in taken
    assert f"\n| weights | {sentence} |\n" in (study / "export/MODEL_CARD.md").read_text()
    assert f"training #{staying[1]} for the soup on train and valid: " in taken
    assert "repeat the winner alone, without the soup" in taken
    assert not list((study / "checkpoints").glob("soup-*")) and m["retrained"]
    best = yaml.safe_load((study / "best.yaml").read_text())
    assert best["recipe"]["lr"] == m["run"]["recipe"]["lr"] == findings["tried"][0]["recipe"]["lr"]


@pytest.mark.slow
def test_where_the_default_recipe_won_it_is_compared_with_the_soup(
    tuner: Tuner, taken: str, space: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of the soup, which lies in the export, is no test of the default recipe."""
    winner = history.best_trial(open_study(study))[0]
    assert manifest(study)["comparison"]["difference"] != 0
    (study / "export/MODEL_CARD.md").unlink()
    text = json.loads((study / "export/manifest.json").read_text())
    del text["files"]["MODEL_CARD.md"]
    text["soup"]["tried"] = text["soup"]["tried"][:1]  # as if a candidate were new
    (study / "export/manifest.json").write_text(json.dumps(text))
    monkeypatch.setattr(history, "default_trial", lambda _: winner)
    said = tuner("run", space)
    assert said.code == 0, said.err
    m = manifest(study)
    comparison = m["comparison"]
    assert comparison["default_trial"] == m["trial"] and m["soup"]["taken"]
    expected = m["scores"]["test"]["log_loss"] - comparison["default_scores"]["log_loss"]
    assert comparison["difference"] == expected != 0


@pytest.mark.usefixtures("quick_program")
def test_a_format_more_trains_nothing_and_is_of_the_soup(
    tuner: Tuner, taken: str, space: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = manifest(study)
    with monkeypatch.context() as patched:
        forbid_training(patched)
        assert "nothing left to do" in tuner("run", space).out
        said = tuner("export", "s", "--format", "torch_export")
        assert said.code == 0, said.err
        shutil.rmtree(study / "checkpoints")  # without candidates the soup stays what it is
        assert tuner("run", space).code == 0
    after = manifest(study)
    assert "torch_export" in after["exports"]
    for key in ("soup", "scores", "comparison", "training_seconds"):
        assert after[key] == before[key]
    assert after["files"]["model.safetensors"] == before["files"]["model.safetensors"]


@pytest.mark.slow
def test_without_the_key_the_winner_is_exported_alone_again(
    tuner: Tuner, taken: str, space: Path, study: Path
) -> None:
    before = manifest(study)
    assert tuner("run", space, "search.soup=none").code == 0
    alone = manifest(study)
    assert alone["soup"] is None and alone["trial"] == before["trial"]
    assert alone["files"]["model.safetensors"] != before["files"]["model.safetensors"]
    shutil.rmtree(study / "export")
    assert tuner("run", space, "search.trials=3").code == 0
    again = manifest(study)  # chosen and trained as at first
    assert again["soup"] == before["soup"]
    assert again["files"]["model.safetensors"] == before["files"]["model.safetensors"]


def test_export_makes_the_soup_where_there_is_no_export(
    tuner: Tuner, taken: str, study: Path
) -> None:
    before = manifest(study)
    shutil.rmtree(study / "export")
    said = tuner("export", "s")
    assert said.code == 0, said.err
    after = manifest(study)
    assert (after["soup"], after["scores"]) == (before["soup"], before["scores"])
    assert tuner("export", "s", "--trial", before["trial"]).code == 0  # a trial is no soup
    single = json.loads((study / f"export-{before['trial']}/manifest.json").read_text())
    assert single["soup"] is None


def test_without_retraining_the_weights_of_the_trials_are_averaged(
    tuner: Tuner, taken: str, space: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = manifest(study)
    monkeypatch.setattr(soup, "retrain_ingredient", lambda *_: pytest.fail("trained again"))
    said = tuner("run", space, "search.retrain=false", "search.compare=none")
    assert said.code == 0, said.err
    after = manifest(study)
    assert after["soup"]["taken"] and not after["retrained"]
    assert after["soup"]["score"] == before["soup"]["score"]
    assert after["files"]["model.safetensors"] != before["files"]["model.safetensors"]


def test_where_validation_takes_no_soup_all_is_as_without(
    tuner: Tuner, space: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other trials have exploded."""
    said = tuner("run", space, *EXPLODING)
    assert said.code == 0, said.err
    m = manifest(study)
    assert not m["soup"]["taken"] and m["soup"]["score"] == m["soup"]["winner_score"]
    assert [entry["stays"] for entry in m["soup"]["tried"]][:1] == [True]
    winner = m["trial"]
    assert f"\nweights  trial {winner} alone: no soup with " in said.out
    assert "for the soup" not in said.out
    with monkeypatch.context() as patched:
        forbid_training(patched)
        assert "nothing left to do" in tuner("run", space, *EXPLODING).out
    shutil.rmtree(study / "export")
    assert tuner("run", space, *EXPLODING, "search.soup=none").code == 0
    alone = manifest(study)
    assert alone["soup"] is None
    assert alone["files"]["model.safetensors"] == m["files"]["model.safetensors"]
    assert alone["scores"] == m["scores"]


def test_trials_of_other_data_or_another_model_are_no_candidates(
    tuner: Tuner, space: Path, study: Path
) -> None:
    keys = ("data.augment=[none,flip]", "search.sampler=grid", "search.trials=6", "search.keep=6")
    assert tuner("run", space, *keys, "search.compare=none").code == 0
    loaded, found = load_study_space(study), open_study(study)
    winner = history.best_trial(found)[0]
    candidates = soup_candidates(loaded, found, study, winner)
    assert candidates is not None and candidates[0].trial_number == winner.number
    augments = {t.number: t.params["data.augment"] for t in history.completed_trials(found)}
    assert len(augments) == 6 and set(augments.values()) == {"none", "flip"}
    same = {n for n, augment in augments.items() if augment == winner.params["data.augment"]}
    assert {candidate.trial_number for candidate in candidates} == same
    assert [entry["trial"] for entry in manifest(study)["soup"]["tried"]] == [
        candidate.trial_number for candidate in candidates
    ]
    # a candidate that was not tried makes an export stale, one that is gone does not
    findings = manifest(study)["soup"]
    assert is_current(findings, candidates[1:]) and is_current(findings, ())
    fewer = findings | {"tried": findings["tried"][:-1]}
    assert not is_current(fewer, candidates) and not is_current(None, candidates)


def test_the_weights_of_every_trial_that_may_win_are_kept_for_a_soup() -> None:
    settings = SearchSettings(keep=1, confirm=ConfirmSettings(top=4))
    assert kept_count(settings) == 1
    assert kept_count(settings.model_copy(update={"soup": "greedy"})) == 4

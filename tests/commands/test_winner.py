"""The winner: confirmed by repeats, tested once, and compared with the default recipe."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna_dashboard import get_note, save_note

from tests.conftest import SMALL, CommandResult
from tuner.config import parsing, yaml_document
from tuner.config.run import ConfirmSettings, Recipe
from tuner.errors import NoUsableTrial
from tuner.files import removal
from tuner.manifest import describe_comparison, read_export
from tuner.search import confirmation, storage
from tuner.tasks.classification import Classification
from tuner.training import finalization, worker_jobs
from tuner.training.building import load_dataset
from tuner.training.tested_runs import TestedRun, compare_tested_runs

Tuner = Callable[..., CommandResult]
# a score below 1: the linear-probe trial is better than the default recipe
HARD = ("data.noise=3", "search.trials=2")


def manifest(study: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((study / "export/manifest.json").read_text())
    return found


def kept_tests(study: Path) -> list[Path]:
    return sorted(study.glob("default-test-*.safetensors"))


@pytest.fixture
def study(small: Path) -> Path:
    return small.parent / "studies" / "small"


@pytest.fixture
def compared(
    tuner: Tuner, small: Path, study: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A finished study whose winner is not the default recipe: run once, a copy for each test.

    What the command printed.
    """
    original = tmp_path_factory.getbasetemp() / "compared"
    if not original.exists():
        said = tuner("run", small, *HARD)
        assert said.code == 0, said.err
        shutil.copytree(study, original)
        (original.with_name("compared.out")).write_text(said.out)
    else:
        shutil.copytree(original, study)
    return (original.with_name("compared.out")).read_text()


def remove_export(study: Path) -> None:
    """As if another trial had won."""
    shutil.rmtree(study / "export")


def open_study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="small", storage=storage.open_storage(None, folder))


def test_the_default_recipe_is_tested_on_the_same_examples_and_the_difference_told(
    compared: str, study: Path
) -> None:
    m, (kept,) = manifest(study), kept_tests(study)
    winner = TestedRun.from_bytes((study / "export/test_results.safetensors").read_bytes())
    default = TestedRun.from_bytes(kept.read_bytes())
    assert winner.run_digest == m["run_digest"] != default.run_digest
    assert winner.scores == m["scores"]["test"] and winner.count == m["examples"]["test"]
    comparison = m["comparison"]
    assert comparison["default_trial"] == 1 and comparison["default_scores"] == default.scores
    assert comparison["difference"] == winner.scores["accuracy"] - default.scores["accuracy"]
    task = Classification(tuple(m["classes"]), 0.0)
    again = compare_tested_runs(task, "accuracy", winner, default, seed=0)
    assert again["interval"] == pytest.approx(comparison["interval"], abs=0.2)  # another seed
    assert "test_results.safetensors" in m["files"] and read_export(study / "export") is not None
    sentence = describe_comparison(m)
    assert sentence is not None
    lines = sentence.replace(" (", "\n         (")
    assert f"\n         {lines}\n" in compared
    assert f"\n\n{sentence}.\n" in (study / "export/MODEL_CARD.md").read_text()
    assert get_note(open_study(study)).startswith(f"**Result:** trial {m['trial']}: {sentence}.")
    assert removal.is_of_study(kept)
    # it is retrained as the winner is
    assert "training the default recipe on train and valid: up to" in compared


def test_the_default_is_tested_once_whatever_wins_later(
    tuner: Tuner, compared: str, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, first_note = manifest(study), get_note(open_study(study))
    remove_export(study)
    save_note(open_study(study), first_note + "\n\nmine")
    monkeypatch.setattr(finalization, "run_default_test", lambda *_: pytest.fail("tested again"))
    assert tuner("run", small, *HARD).code == 0
    assert manifest(study)["comparison"] == before["comparison"]
    assert get_note(open_study(study)) == first_note + "\n\nmine"


def test_a_search_killed_between_the_two_tests_goes_on_with_the_second(
    tuner: Tuner, compared: str, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = manifest(study)
    (before,) = kept_tests(study)
    content = before.read_bytes()
    shutil.rmtree(study)

    def refuse(*_: object) -> None:
        raise NoUsableTrial("as if killed here")

    with monkeypatch.context() as patched:
        patched.setattr(finalization, "train_winner", refuse)
        assert tuner("run", small, *HARD).code != 0
    (kept,) = kept_tests(study)
    assert not (study / "export").exists()
    with monkeypatch.context() as patched:
        patched.setattr(finalization, "run_default_test", lambda *_: pytest.fail("tested again"))
        assert tuner("run", small, *HARD).code == 0
    assert manifest(study)["comparison"] == undisturbed["comparison"]
    assert kept.name == before.name and kept.read_bytes() == content


def test_a_damaged_test_is_made_again(
    tuner: Tuner, compared: str, small: Path, study: Path
) -> None:
    (kept,) = kept_tests(study)
    content, comparison = kept.read_bytes(), manifest(study)["comparison"]
    kept.unlink()
    kept.write_bytes(content[:-1] + b"?")
    remove_export(study)
    assert tuner("run", small, *HARD).code == 0
    assert manifest(study)["comparison"] == comparison


def test_where_the_default_recipe_wins_nothing_is_trained_twice(
    tuner: Tuner, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalization, "run_default_test", lambda *_: pytest.fail("trained twice"))
    said = tuner("run", small, "data.noise=3", "search.trials=1")
    assert manifest(study)["comparison"] == {"default_trial": 0}
    assert "the default recipe won: the search found nothing better\n" in said.out
    # its test is in the export: a later winner is compared with it, and it is not tested again
    default_scores = manifest(study)["scores"]["test"]
    more = tuner("run", small, "data.noise=3", "search.trials=8")
    assert more.code == 0, more.err
    assert manifest(study)["trial"] != 0
    assert manifest(study)["comparison"]["default_scores"] == default_scores


def test_the_comparison_can_be_left_out(
    tuner: Tuner, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalization, "run_default_test", lambda *_: pytest.fail("it is trained"))
    said = tuner("run", small, *HARD, "search.compare=none")
    assert said.code == 0 and "over the default recipe" not in said.out
    assert manifest(study)["comparison"] is None
    assert "test_results.safetensors" not in manifest(study)["files"]
    wrong = tuner("run", small, "search.compare=defualt")
    assert wrong.code == 2 and "did you mean 'default'?" in wrong.err


def test_a_default_recipe_that_diverges_does_not_take_the_winner_with_it(
    tuner: Tuner, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object) -> None:
        raise NoUsableTrial("training diverged (loss nan)")

    monkeypatch.setattr(finalization, "run_default_test", diverge)
    said = tuner("run", small, *HARD)
    assert said.code == 0 and manifest(study)["comparison"] is None
    assert "not compared with the default recipe, since its training diverged" in said.err


@pytest.mark.usefixtures("quick_program")
def test_a_further_format_keeps_the_comparison(tuner: Tuner, compared: str, study: Path) -> None:
    before = manifest(study)
    assert tuner("export", "small", "--format", "torch_export").code == 0
    after = manifest(study)
    assert set(after["exports"]) > set(before["exports"])
    assert after["comparison"] == before["comparison"]
    name = "test_results.safetensors"
    assert after["files"][name] == before["files"][name]


@pytest.mark.slow
def test_without_retraining_the_default_is_as_its_trial_left_it(
    tuner: Tuner, small: Path, study: Path
) -> None:
    said = tuner("run", small, *HARD, "search.retrain=false")
    assert "training the default recipe" not in said.out  # its weights are kept
    tested = TestedRun.from_bytes(kept_tests(study)[0].read_bytes())
    again = tuner("run", small, *HARD, "search.retrain=false", "search.name=again", "search.keep=1")
    assert "training the default recipe on train: up to" in again.out
    other = TestedRun.from_bytes(kept_tests(study.with_name("again"))[0].read_bytes())
    assert (other.run_digest, other.scores) == (tested.run_digest, tested.scores)


@pytest.mark.parametrize(
    ("scores", "interval", "expected"),
    [
        ((0.93, 0.909), [0.004, 0.037], "+2.1 points over the default recipe on the test examples (95 %: +0.4 to +3.7)"),
        ((0.93, 0.924), [-0.009, 0.021], "+0.6 points over the default recipe on the test examples (95 %: -0.9 to +2.1): within the noise of 300 test examples"),
        ((0.90, 0.92), [-0.03, -0.01], "-2.0 points over the default recipe on the test examples (95 %: -3.0 to -1.0): the default recipe is better"),
        ((-3.1, -3.3), [0.15, 0.25], "+0.2000 accuracy over the default recipe on the test examples (95 %: +0.1500 to +0.2500)"),
        ((0.93, 0.909), None, "+2.1 points over the default recipe on the test examples, without an interval: the task keeps no results of single examples"),
    ],
)  # fmt: skip
def test_the_sentence(
    scores: tuple[float, float], interval: list[float] | None, expected: str
) -> None:
    comparison = {
        "default_trial": 1,
        "metric": "accuracy",
        "default_scores": {"accuracy": scores[1]},
        "difference": scores[0] - scores[1],
        "interval": interval,
        "confidence": 0.95,
        "draws": 1000,
    }
    m = {
        "comparison": comparison,
        "scores": {"test": {"accuracy": scores[0]}},
        "examples": {"test": 300},
    }
    assert describe_comparison(m) == expected


def test_a_loss_below_1_is_no_share_and_has_no_points() -> None:
    comparison = {
        "metric": "log_loss",
        "default_scores": {"log_loss": 0.2},
        "difference": 0.25,
        "interval": [0.1, 0.4],
        "confidence": 0.95,
    }
    m = {
        "comparison": comparison,
        "direction": "minimise",
        "scores": {"test": {"log_loss": 0.45}},
        "examples": {"test": 300},
    }
    assert describe_comparison(m) == (
        "+0.2500 log loss over the default recipe on the test examples (95 %: +0.1000 to +0.4000), "
        "where less is better: the default recipe is better"
    )


def test_an_export_of_an_earlier_version_has_no_sentence() -> None:
    assert describe_comparison({"scores": {}, "recipe": Recipe().model_dump()}) is None


# -- confirmation

CONFIRM = ("data.noise=3", "search.trials=3", "search.pruner=none", "recipe.epochs=2")
CONFIRMED = (*CONFIRM, "search.confirm={top: 2, repeats: 2}")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_program")
def test_the_best_trials_are_confirmed_and_killed_and_continued_equals_undisturbed(
    tuner: Tuner, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuner("run", small, *CONFIRMED, "search.name=whole")
    assert whole.code == 0, whole.err
    assert len(re.findall(r"^#\d again, [12] of 2: accuracy 0\.\d{4}$", whole.out, re.M)) == 4
    expected = manifest(study.with_name("whole"))
    repeats, real = [], worker_jobs.run_repeat

    def counted(*arguments: Any) -> Any:
        repeats.append(arguments[0].run.seed)
        return real(*arguments)

    def killed(point: str) -> None:
        if point == "confirm.kept" and len(repeats) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(worker_jobs, "run_repeat", counted)
    with monkeypatch.context() as patched:
        patched.setattr("tuner.search.confirmation.crash_point", killed)
        assert tuner("run", small, *CONFIRMED).code == 130
    assert len(repeats) == 3 and not (study / "export").exists()
    said = tuner("run", small, *CONFIRMED)
    assert said.code == 0 and len(repeats) == 4
    found = manifest(study)
    for key in ("confirmation", "comparison", "trial", "run_digest", "scores"):
        assert found[key] == expected[key]
    c = found["confirmation"]
    means = {candidate["trial"]: sum(candidate["scores"]) / 2 for candidate in c["candidates"]}
    assert len(means) == 2 and c["mean"] == pytest.approx(means[found["trial"]])
    assert c["is_cheaper"] or c["mean"] == pytest.approx(max(means.values()))
    header = (study / "best.yaml").read_text().splitlines()[0]
    assert f"; confirmed at {c['mean']:.4f} +- {c['deviation']:.4f} in 2 repeats; " in header
    shown = f"confirmed {c['mean']:.4f} in 2 repeats with other seeds and splits, seed noise "
    assert shown in said.out
    assert not list((study / "checkpoints").glob("confirm-*"))
    # nothing is repeated for a further format, and the same trial is exported
    assert tuner("export", "small", "--format", "torch_export").code == 0
    assert manifest(study)["confirmation"] == c and manifest(study)["trial"] == found["trial"]
    assert len(repeats) == 4


def test_the_confirmed_trial_is_exported_although_another_has_the_highest_score(
    tuner: Tuner, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker_jobs.run_repeat
    favourite: list[float] = []

    def favouring(assignment: Any, *more: Any) -> Any:
        """The second candidate has the better repeats."""
        lr = assignment.run.recipe.lr
        favourite.append(lr)
        result = real(assignment, *more)
        scores = {"accuracy": 0.9 if lr == favourite[1] else 0.1}
        epochs = (*result.epochs[:-1], replace(result.epochs[-1], scores=scores))
        return replace(result, epochs=epochs)

    monkeypatch.setattr(worker_jobs, "run_repeat", favouring)
    said = tuner("run", small, *CONFIRMED, "search.compare=none")
    assert said.code == 0, said.err
    m = manifest(study)
    assert m["confirmation"]["candidates"][1]["trial"] == m["trial"]
    best = open_study(study).best_trial
    assert best.number != m["trial"] and m["run"]["recipe"]["lr"] == favourite[1] != favourite[0]
    assert yaml.safe_load((study / "best.yaml").read_text())["recipe"]["lr"] == favourite[1]
    shutil.rmtree(study / "export")
    assert tuner("export", "small").code == 0
    assert manifest(study)["trial"] == m["trial"]  # chosen from what the study has


def test_search_confirm_none_repeats_nothing(
    tuner: Tuner, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_jobs, "run_repeat", lambda *_: pytest.fail("it is repeated"))
    monkeypatch.setattr(confirmation, "AUTO_SETTINGS", ((1, ConfirmSettings(top=1, repeats=1)),))
    said = tuner("run", small, *HARD, "search.confirm=none", "search.compare=none")
    assert said.code == 0 and manifest(study)["confirmation"] is None
    assert "confirmed" not in said.out


def test_a_study_that_an_earlier_version_finished_stays_finished(
    tuner: Tuner, compared: str, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirmation, "AUTO_SETTINGS", ((1, ConfirmSettings(top=1, repeats=1)),))
    before = {k: v for k, v in manifest(study).items() if k not in ("confirmation", "comparison")}
    (study / "export/manifest.json").write_text(json.dumps(before))
    with monkeypatch.context() as patched:
        patched.setattr(worker_jobs, "run_repeat", lambda *_: pytest.fail("it is repeated"))
        said = tuner("run", small, *HARD)
    assert said.code == 0 and "nothing left to do" in said.out and manifest(study) == before
    more = tuner("run", small, "data.noise=3", "search.trials=3")  # new trials open it again
    assert "again, 1 of 1: accuracy" in more.out, more.err


def test_a_winner_that_is_confirmed_later_is_not_trained_or_tested_again(
    tuner: Tuner, compared: str, small: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = manifest(study)
    for name in ("run_default_test", "train_winner"):
        monkeypatch.setattr(finalization, name, lambda *_: pytest.fail("trained or tested again"))
    confirm = ("search.confirm.top=1", "search.confirm.repeats=1")
    said = tuner("run", small, *HARD, *confirm)
    assert said.code == 0, said.err
    after = manifest(study)
    assert after["confirmation"]["candidates"][0]["trial"] == before["trial"]
    assert (after["comparison"], after["scores"]) == (before["comparison"], before["scores"])
    assert "nothing left to do" in tuner("run", small, *HARD, *confirm).out


def test_without_retraining_the_weights_of_every_candidate_are_kept(
    tuner: Tuner, small: Path, study: Path
) -> None:
    confirm = "search.confirm={top: 2, repeats: 1}"
    said = tuner("run", small, *HARD, "search.retrain=false", "search.keep=1", confirm)
    assert said.code == 0, said.err
    assert manifest(study)["retrained"] is False
    assert len(list((study / "checkpoints").glob("*/best-*.safetensors"))) == 2


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_repeats_validate_on_other_examples_and_never_touch_the_test_part(
    augment: str, tmp_path: Path
) -> None:
    words = ("recipe.lr=0.01", "recipe.optimizer=sgd", "recipe.momentum=0.9")
    more = ("recipe.freeze_depth=5", "recipe.epochs=1", f"data.augment={augment}")
    document = parsing.apply_overrides(
        yaml_document.parse_document(SMALL, "small.yaml"), [*words, *more]
    )
    run = parsing.parse_space(document).sample(None, seed=1)
    data = load_dataset(run, tmp_path)
    folds = confirmation.fold_count(run, 3, len(data.train), len(data.valid))
    valid_rows = []
    for repeat in range(3):
        repeated = load_dataset(confirmation.run_of_repeat(run, 1, repeat, folds, 0), tmp_path)
        # equal digests: what frozen stages computed for the whole is shared
        assert (repeated.test.digest, repeated.full.digest) == (data.test.digest, data.full.digest)
        assert abs(len(repeated.valid) - len(data.valid)) <= 2
        index = torch.arange(len(repeated.valid))
        pixels = repeated.valid.take(index, 0).x
        valid_rows += [row.numpy().tobytes() for row in pixels]  # type: ignore[union-attr]
    assert len(set(valid_rows)) == len(valid_rows)  # no example validates twice

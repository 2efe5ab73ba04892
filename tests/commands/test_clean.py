"""`tuner clean`: what it shows, what it removes, and what it never touches."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandResult
from tuner import manifest
from tuner.files.tracker_folders import make_tracker_folder

Tuner = Callable[..., CommandResult]


ROOT = Path(__file__).parents[2]
HALF_EXPORT, HALF_FILE = ".export-abcd_123.tmp", ".abcd_123.tmp"
CHECKPOINT = f"checkpoints/0/000002-{'0' * 64}.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def study(tuner: Tuner, small: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished study, with what a killed run may leave in its folder."""
    monkeypatch.setenv("TUNER_HOME", str(small.parent / "home"))
    if not (finished / "studies").exists():
        assert (
            tuner(
                "run",
                small,
                "search.trials=1",
                "recipe.freeze_depth=3",
                "engine.cache=always",
                "search.keep=0",
                "--quiet",
            ).code
            == 0
        )
        for made in ("studies", "home"):
            shutil.copytree(small.parent / made, finished / made)
    for made in ("studies", "home"):
        shutil.copytree(finished / made, small.parent / made, dirs_exist_ok=True)
    folder = small.parent / "studies" / "small"
    (folder / HALF_EXPORT).mkdir()
    (folder / HALF_EXPORT / "model.safetensors").write_bytes(bytes(2_000_000))
    (folder / HALF_FILE).write_bytes(bytes(10))
    (folder / CHECKPOINT).parent.mkdir(parents=True)
    (folder / CHECKPOINT).write_bytes(bytes(1_000_000))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_leftovers_and_checkpoints_go_and_what_a_study_is_made_of_stays(
    tuner: Tuner, study: Path
) -> None:
    before = names(study)
    said = tuner("clean", "small")
    assert (said.code, said.err) == (0, "")
    assert before - names(study) == {HALF_EXPORT, HALF_FILE, "checkpoints"}
    first, *rest = said.out.splitlines()
    assert first.startswith("study small: ") and all(
        kind in first for kind in ("leftovers 2.0 MB", "checkpoints 1.0 MB", "exports", "trials")
    )
    assert (
        rest[-1] == "removed 3.0 MB in all"
        and f"removed checkpoints: {Path('studies/small/checkpoints')}, 1.0 MB" in rest
    )
    assert manifest.read_export(study / "export") is not None
    assert "nothing to remove" in tuner("clean", "small").out
    assert (
        tuner(
            "run",
            study.parents[1] / "small.yaml",
            "search.trials=1",
            "recipe.freeze_depth=3",
            "engine.cache=always",
        ).code
        == 0
    )


def test_checkpoints_of_trials_that_will_go_on_stay(tuner: Tuner, study: Path) -> None:
    import optuna

    optuna.load_study(study_name="small", storage=f"sqlite:///{study}/study.db").enqueue_trial({})
    said = tuner("clean", "small")
    assert (
        said.code == 0
        and "1 trials were interrupted and will go on, so checkpoints are kept" in said.out
    )
    assert (study / CHECKPOINT).exists() and not (study / HALF_FILE).exists()


def test_a_dry_run_removes_nothing(tuner: Tuner, study: Path) -> None:
    before = sorted(str(p) for p in study.parents[1].rglob("*"))
    said = tuner("clean", "small", "--all", "--cache", "--dry-run")
    assert (
        said.code == 0
        and "would remove study: " in said.out
        and "would remove remembered activations: " in said.out
    )
    assert sorted(str(p) for p in study.parents[1].rglob("*")) == before


def test_all_asks_first_and_then_removes_the_study(
    tuner: Tuner, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    said = tuner("clean", "small", "--all")
    assert (
        "remove studies/small with" in said.out
        and "nothing was removed" in said.out
        and (study / "study.db").exists()
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert tuner("clean", "small", "--all").code == 0
    assert not study.exists()


@pytest.mark.slow
def test_all_takes_the_study_out_of_a_database_elsewhere(tuner: Tuner, small: Path) -> None:
    import optuna

    url = f"sqlite:///{small.parent}/elsewhere.db"
    other = optuna.create_study(storage=url, study_name="other")
    assert (
        tuner(
            "run", small, "search.trials=1", f"storage='{url}'", "search.retrain=false", "--quiet"
        ).code
        == 0
    )
    assert optuna.get_all_study_names(url) == [other.study_name, "small"]
    assert tuner("clean", "small", "--all", "--yes").code == 0
    assert (
        optuna.get_all_study_names(url) == ["other"]
        and not (small.parent / "studies/small").exists()
    )


def test_a_study_whose_own_modules_do_not_import_here_is_cleaned(tuner: Tuner, study: Path) -> None:
    written = (study / "space.yaml").read_text()
    (study / "space.yaml").write_text(re.sub("resnet18_slim", "not_here:build", written))
    assert (said := tuner("clean", "small")).code == 0 and "removed checkpoints" in said.out
    (study / "space.yaml").write_text(f"{written}\nstorage: [1]\n")
    said = tuner("clean", "small", "--all", "--yes")
    assert said.code == 2 and re.search(r"space\.yaml:\d+: storage: ", said.err)
    (study / "space.yaml").write_text(re.sub("resnet18_slim", "not_here:build", written))
    assert tuner("clean", "small", "--all", "--yes").code == 0
    assert not study.exists()


def test_a_study_that_is_being_run_is_left_alone(tuner: Tuner, study: Path) -> None:
    with open(study / "lock") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        said = tuner("clean", "small", "--all", "--yes")
    assert said.code == 4 and "study 'small' is being run by" in said.err
    assert {"checkpoints", HALF_FILE, "study.db"} <= names(study)


def test_an_older_export_that_a_kill_moved_away_is_not_taken_for_a_leftover(
    tuner: Tuner, study: Path
) -> None:
    (study / "export").rename(study / ".export.old")
    assert tuner("clean", "small").code == 0
    assert (study / ".export.old" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [(["smal"], 3, "did you mean 'small'?"), ([], 2, "name a study, or say --cache")],
)
def test_errors_teach(words: list[str], code: int, message: str, tuner: Tuner, study: Path) -> None:
    said = tuner("clean", *words)
    assert said.code == code and message in said.err and said.out == ""


HOLD = """
import sys
from pathlib import Path
from tuner.files.cache_entries import try_open
entry = try_open(Path(sys.argv[1]))
print(entry is not None, flush=True)
sys.stdin.read()
"""


def test_the_caches_go_but_for_what_another_process_is_reading(tuner: Tuner, study: Path) -> None:
    home = Path(os.environ["TUNER_HOME"])
    read, *others = [path for path in (home / "activations").iterdir() if path.is_dir()]
    (home / "weights").mkdir(exist_ok=True)
    (home / "weights" / "precious").write_text("")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(read)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "True\n"
        said = tuner("clean", "--cache")
        assert "kept 1 entries that are being used" in said.out, said
        assert (
            read.exists()
            and not any(path.exists() for path in others)
            and (home / "weights" / "precious").exists()
        )
        assert json.loads((read / "sha256.json").read_text())
        reader.communicate("")
    assert tuner("clean", "--cache").code == 0
    assert (
        list((home / "activations").iterdir())
        == list((home / "images").iterdir())
        == list((home / "probes").iterdir())
        == []
    )


def test_the_folders_that_tuner_made_for_trackers_go_with_the_study(
    tuner: Tuner, study: Path
) -> None:
    make_tracker_folder(study / "tensorboard")
    (study / "tensorboard/trial-0000").mkdir()
    (study / "tensorboard/trial-0000/events.out.tfevents.1").write_bytes(bytes(2_000_000))
    (study / "wandb").mkdir()
    make_tracker_folder(study / "wandb")  # it was there, so it is not tuner's
    (study / "wandb/own.txt").write_text("notes")
    said = tuner("clean", "small", "--dry-run")
    assert "trackers 2.0 MB" in said.out and "not tuner's 0.0 MB" in said.out, said.out
    assert tuner("clean", "small").code == 0 and (study / "tensorboard/trial-0000").is_dir()
    said = tuner("clean", "small", "--all", "--yes")
    assert said.code == 0 and "kept what tuner did not make: wandb" in said.out, said.out
    assert [path.name for path in study.rglob("*")] == ["wandb", "own.txt"]

"""tuner removes only what it made: whatever else lies where it writes is there afterwards, byte for byte."""

import ast
import errno
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tuner as package
from tests.conftest import CommandResult, limit_file_size
from tuner import manifest
from tuner.commands import session
from tuner.engines._ray_worker import RayWorker
from tuner.errors import StorageError
from tuner.files import cache_entries, checkpoint_files, removal
from tuner.files.atomic import file_lock, file_sha256, half_export, remove_leftovers
from tuner.files.checkpoint_files import checkpoint_name
from tuner.search import storage
from tuner.training.publishing import replace_folder

Tuner = Callable[..., CommandResult]

RUN = """
task: classification
data: {name: synthetic, examples: 60, classes: 3, size: 32}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: sgd, lr: 0.01, freeze_depth: 5, epochs: 1, batch_size: 16}
search: {trials: 1, seed: 0}
engine: {name: inline, device: cpu}
export: [safetensors]
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A file with one run, its folder holding a project of somebody's own."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def written(folder: Path, **files: str) -> Path:
    """A folder with files of the user's own."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def export(folder: Path, **files: str) -> Path:
    """An export as a manifest vouches for it."""
    written(folder, **files)
    sums = {str(p.relative_to(folder)): file_sha256(p) for p in folder.rglob("*") if p.is_file()}
    text = {"tuner": "0.1", "run_digest": "", "files": sums, "exports": {}, "says": files}
    (folder / "manifest.json").write_text(json.dumps(text))
    return folder


# -- the law, read from the source

REMOVES = {"rmtree", "unlink", "rmdir", "removedirs", "renames", "rename", "mkdtemp"}
REMOVES |= {"TemporaryDirectory", "move"}


def removals(source: str) -> list[str]:
    """The calls in a source that remove, or that put something in the place of something else."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil", "tempfile"):
            found += [a.name for a in node.names if a.name in REMOVES | {"remove", "replace"}]
        if isinstance(node, ast.Attribute):
            of_os = isinstance(node.value, ast.Name) and node.value.id == "os"
            if node.attr in REMOVES or (of_os and node.attr in ("remove", "replace")):
                found.append(ast.unparse(node))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "replace"
            and (len(node.args), node.keywords) == (1, [])  # of a path; a text's has two
        ):
            found.append(ast.unparse(node))
    return found


def test_one_module_removes_and_no_other() -> None:
    home = Path(package.__file__).parent
    found = {
        str(path.relative_to(home)): removals(path.read_text())
        for path in home.rglob("*.py")
        if path.name != "removal.py"
    }
    assert {name: calls for name, calls in found.items() if calls} == {}
    for source in (
        "shutil.rmtree(x)",
        "atexit.register(shutil.rmtree, x)",
        "path.unlink()",
        "os.replace(a, b)",
        "os.remove(a)",
        "a.replace(b)",
        "a.rename(b)",
        "from os import unlink",
    ):
        assert removals(source), source
    assert removals("'a'.replace('b', 'c'); found.remove(x); dataclasses.replace(x, y=1)") == []


# -- exports


def test_train_refuses_a_folder_of_somebody_elses_before_anything_is_trained(
    tuner: Tuner, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = run.parent
    written(home / "results", thesis__chapter="years of work")
    written(home / "checkpoints" / "results", mine="a model")
    (home / "file").write_text("mine")
    before = tree(home)
    words = {
        "results": "holds no export but thesis, which tuner did not make",
        ".": "is where this command runs",
        "..": "is where this command runs",
        "file": "is no folder",
    }
    for out, message in words.items():
        said = tuner("train", run, "--out", out)
        assert said.code == 4 and message in said.err, said
        assert said.out == "" and tree(home) == before
    (home / "empty").mkdir()
    assert tuner("train", run, "--out", "empty", "-q").code == 0
    assert manifest.read_export(home / "empty") is not None
    (home / "empty").rename(home / "results-2")
    names = {*map(str, home.iterdir())}
    assert tuner("train", run, "--out", "results-2", "recipe.lr=0.02", "-q").code == 0
    assert {*map(str, home.iterdir())} == names  # neither locks nor checkpoints are left beside it
    published = manifest.read_export(home / "results-2")
    assert published is not None and published.run.recipe.lr == 0.02
    assert before.items() <= tree(home).items()
    written(home / "results-2", notes="read this first")
    said = tuner("train", run, "--out", "results-2")
    assert said.code == 4 and "holds an export and also notes, which tuner did not make" in said.err
    assert (home / "results-2" / "notes").read_text() == "read this first"


def test_a_search_and_an_export_refuse_folders_of_somebody_elses(tuner: Tuner, run: Path) -> None:
    project = written(run.parent / "project", export__app="mine", checkpoints__7__mine="too")
    written(project, **{"poetry.lock": "", "space.yaml": "# my own\n"})
    words = ("run", run, "search.name=project", "--studies", ".", "search.retrain=false", "-q")
    before = tree(run.parent)
    said = tuner(*words)
    assert said.code == 4 and "project/space.yaml was not written by tuner" in said.err
    (project / "space.yaml").rename(project / "mine.yaml")
    said = tuner(*words)
    assert said.code == 4 and "project/export holds no export but app" in said.err
    (project / "mine.yaml").rename(project / "space.yaml")
    assert tree(run.parent) == before
    (project / "space.yaml").rename(project / "mine.yaml")
    (project / "export").rename(project / "export-0")
    assert tuner(*words).code == 0
    said = tuner("export", "project", "--trial", "0", "--studies", ".")
    assert said.code == 4 and "project/export-0 holds no export but app" in said.err
    said = tuner("clean", "project", "--all", "--yes", "--studies", ".")
    assert (
        said.code == 0
        and "kept what tuner did not make: checkpoints, export-0, mine.yaml" in said.out
    ), said
    mine = {"export-0/app", "checkpoints/7/mine", "poetry.lock", "mine.yaml"}
    assert set(tree(project)) == mine


def test_two_cannot_write_one_export_and_the_second_hears_who_does(tuner: Tuner, run: Path) -> None:
    with session.publishing(run.parent / "out"):
        said = tuner("train", run, "--out", run.parent / "out")
    holder = f"out is being written by pid {os.getpid()} on host "
    assert said.code == 4 and holder in said.err
    assert [p.name for p in run.parent.iterdir()] == ["run.yaml"]
    written(run.parent, **{".out.lock": "version = 1\n"})
    said = tuner("train", run, "--out", "out")
    assert said.code == 4 and ".out.lock is no lock of tuner's" in said.err
    assert (run.parent / ".out.lock").read_text() == "version = 1\n"


def test_an_export_that_is_being_written_is_not_swept_and_a_dead_ones_is(tmp_path: Path) -> None:
    stranger = written(tmp_path / ".export-notes.tmp", mine="yes")
    with half_export(tmp_path) as half:
        (half / "model.safetensors").write_bytes(b"half")
        remove_leftovers(tmp_path)
        manifest.recover_export(tmp_path / "train")
        assert (half / "model.safetensors").exists()
    assert [*tmp_path.iterdir()] == [stranger]
    (tmp_path / ".export-abcd1234.tmp").mkdir()  # of an older version: it had no lock
    (tmp_path / ".export-0bcd1234.lock").touch()
    written(tmp_path / ".train.old", mine="no export")
    manifest.recover_export(tmp_path / "train")
    assert {p.name for p in tmp_path.iterdir()} == {stranger.name, ".train.old"}


def test_whoever_reads_while_exports_take_each_others_place_finds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent: list[str] = []
    monkeypatch.setattr(removal, "crash_point", absent.append)  # passed where no export is in place
    folder, over, found = tmp_path / "export", threading.Event(), []
    export(folder, model="0")

    def read() -> None:
        while not over.is_set():
            published = manifest.read_export(folder)
            found.append(published and published.manifest["says"])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(60):
            with half_export(tmp_path) as new:
                replace_folder(export(new, model=str(number), **{f"only{number % 2}": ""}), folder)
    finally:
        over.set()
        reader.join()
    assert len(found) > 9 and None not in found
    if sys.platform == "linux":
        assert absent == []
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("atomic", [True, False])
def test_an_older_export_goes_and_with_something_else_in_it_stays(
    tmp_path: Path, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:  # a system that cannot exchange two folders in one step
        monkeypatch.setattr(removal, "exchanged", lambda one, other: False)
    folder = export(tmp_path / "out", model="old", large="old")
    with half_export(tmp_path) as new:
        replace_folder(export(new, model="new"), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (folder / "model").read_text() == "new" and not (folder / "large").exists()
    written(folder, notes="mine")
    with pytest.raises(StorageError, match="notes"), half_export(tmp_path) as new:
        replace_folder(export(new, model="newer"), folder)
    assert (folder / "notes").read_text() == "mine" and (folder / "model").read_text() == "new"


def test_a_manifest_that_points_elsewhere_removes_nothing_there(tmp_path: Path) -> None:
    other = written(tmp_path / "other", mine="yes", linked="too")
    folder = export(tmp_path / "out", model="old")
    (folder / "link").symlink_to(other)
    text = json.loads((folder / "manifest.json").read_text())
    text["files"] |= {"../other/mine": "", "link/linked": "", str(other / "mine"): ""}
    (folder / "manifest.json").write_text(json.dumps(text))
    removal.remove_export(folder)
    assert tree(other) == {"mine": b"yes", "linked": b"too"}
    assert not (folder / "model").exists()


# -- checkpoints, nodes of a cluster, caches


def test_checkpoints_go_by_their_names(tmp_path: Path) -> None:
    kept = checkpoint_files.CheckpointRetention(tmp_path / "checkpoints", 0)
    ours = checkpoint_name("000001", b"x")
    for place in ("checkpoints/0/", "checkpoints/0/fold-1/", "checkpoints/1/", ".out.checkpoints/"):
        written(tmp_path, **{place + ours: "", place + ".abcdefgh.tmp": ""})
    written(tmp_path / "checkpoints" / "1", mine="yes")
    kept.on_trial_end(0)
    kept.on_trial_end(1)
    checkpoint_files.remove_training_checkpoints(checkpoint_files.place_of(tmp_path / "out"))
    assert tree(tmp_path) == {"checkpoints/1/mine": b"yes"}
    assert not (tmp_path / "checkpoints/0").exists()


def test_a_slot_clears_only_what_tuner_left_on_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slot = RayWorker(str(tmp_path), [], 1, 1.0)
    thesis = written(tmp_path / "results", thesis__chapter="years of work")
    assert slot.clear_folder(str(thesis)) == ["thesis"]
    mixed = export(tmp_path / "mixed", model="old")
    written(mixed, notes="mine")
    before = tree(tmp_path)
    assert slot.clear_folder(str(mixed)) == ["notes"] and tree(tmp_path) == before
    training = written(
        tmp_path / "training", **{checkpoint_name("000001", b"x"): "", "mine": "yes"}
    )
    assert slot.clear_folder(str(training)) == ["mine"] and tree(training) == {"mine": b"yes"}
    written(tmp_path / ".old.0123abcd.arriving", model="half")  # of a driver that was killed
    assert slot.clear_folder(str(export(tmp_path / "old", model="old", tokenizer__a="b"))) == []
    assert {p.name for p in tmp_path.iterdir()} == {"results", "mixed", "training"}


def test_what_lies_in_the_home_and_is_no_entry_stays(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_HOME", str(tmp_path))
    written(tmp_path / "images" / "holiday", photo="beach")
    written(tmp_path / "images", **{"uv.lock": "", ".draft.tmp": "mine", "list.txt": "mine"})
    os.utime(tmp_path / "images" / "holiday", (1, 1))
    ours = written(tmp_path / "images" / ("0" * 32), pixels="")
    before = tree(tmp_path)
    assert not cache_entries.evict_entry(tmp_path / "images" / "holiday")
    cache_entries.make_space(tmp_path / "images", 0)
    said = tuner("clean", "--cache")
    assert said.code == 0 and not ours.exists()
    assert tree(tmp_path).items() <= before.items() and len(before) == len(tree(tmp_path)) + 1


# -- studies


def test_a_folder_that_only_holds_a_space_file_is_no_study(tuner: Tuner, run: Path) -> None:
    project = written(run.parent / "project", src__main="code", **{"study.db": "mine"})
    (project / "space.yaml").write_text(RUN)
    for words in (["--all", "--yes"], []):
        said = tuner("clean", project, *words)
        assert said.code == 3 and "holds no study of tuner's" in said.err
    assert set(tree(project)) == {"src/main", "study.db", "space.yaml"}


# -- locks


def test_a_file_system_without_locks_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (errno.ENOSYS, errno.ENOLCK):

        def flock(*_: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", flock)
            with pytest.raises(StorageError, match="file system has no locks") as error:
                storage.lock_study(tmp_path / "s").__enter__()
            assert "being run" not in str(error.value)
            with pytest.raises(StorageError, match="no locks"):
                file_lock(tmp_path / "lock").__enter__()


def test_the_holder_of_a_lock_is_written_or_the_full_disk_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk full while writing"), limit_file_size(0):
        storage.lock_study(tmp_path / "s").__enter__()
    with (
        storage.lock_study(tmp_path / "{s}"),
        pytest.raises(StorageError, match=rf"study '{{s}}' is being run by pid {os.getpid()} on"),
    ):
        storage.lock_study(tmp_path / "{s}").__enter__()


# -- Ctrl-C


def test_after_ctrl_c_the_command_is_named_as_it_was_typed(
    tuner: Tuner, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.commands.console import Console

    assert tuner("run", run, "search.retrain=false", "-q").code == 0

    def retraining(*_: Any, **more: Any) -> Callable[[Any], None]:
        return lambda epoch: os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Console, "show_retraining", retraining)
    typed = {
        f"tuner train {run} --out 'my model'": ("train", run, "--out", "my model"),
        "tuner export run --trial 0": ("export", "run", "--trial", "0"),
    }
    for line, words in typed.items():
        said = tuner(*words)
        assert said.code == 130, said
        assert f"interrupted; `{line}` continues where it stopped" in said.err
    url = "storage=postgresql://me:secret@host/db"
    shown = session.command(["run", "a.yaml", url, f"storage='{url[8:]}'", "data.path=/my data"])
    assert "secret" not in shown and shown.endswith(" 'data.path=/my data'")

"""Killed at every named point of the code and started again, a study ends as if nothing had happened."""

import ast
import contextlib
import functools
import hashlib
import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.helpers.forked_commands import ForkServer, forks
from tuner import manifest
from tuner.files.crash_points import CRASH_POINTS

STUDY = """
task: classification
data: {name: synthetic, examples: 60, classes: 3, size: 32}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: sgd, lr: [0.001, 0.01], freeze_depth: [3, 5], epochs: 2, batch_size: 16}
search: {name: s, trials: 6, sampler: random, pruner: none, seed: 0, retries: 9, confirm: {top: 2, repeats: 2}}
engine: {name: inline, device: cpu, cache: always}
export: [safetensors]
"""

# Of its three trials the two best are better together.
SOUP = """
task: classification
data: {name: synthetic, examples: 60, classes: 3, size: 32, noise: 2}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: adamw, lr: [0.001, 0.002, 0.003], freeze_depth: 4, epochs: 1, batch_size: 16}
search: {name: s, trials: 3, seed: 0, metric: log_loss, confirm: none, soup: greedy}
engine: {name: inline, device: cpu}
export: [safetensors]
"""

# All that makes training better and restarting harder at once.
EVERYTHING = """
task: classification
data: {name: synthetic, examples: 60, classes: 3, size: 32, noise: 2, augment: strong}
model: {name: resnet18_slim, weights: bundled}
recipe:
  optimizer: adamw
  lr: [0.001, 0.003]
  weight_decay: 0.05
  layer_decay: 0.8
  head_lr: 2
  unfreeze_every: 1
  freeze_depth: 3
  epochs: 3
  batch_size: 16
  accumulate: 2
  schedule: onecycle
  clip_norm: 1
  ema: 0.9
  mixup: 0.2
  cutmix: 1
  class_weights: balanced
  sampling: balanced
  focal_gamma: 2
  label_smoothing: 0.1
search:
  {name: s, trials: 3, seed: 0, metric: log_loss, soup: greedy, test_flips: true,
   confirm: {top: 2, repeats: 1}}
engine: {name: inline, device: cpu}
export: [safetensors]
"""

# Points that the study passes are tested with it, the others with a work that passes them.
WORKS = {"note": "timing", "download": "downloading", "pins": "pinning", "tokens": "encoding"}
LATER = (
    "search.requeued",
    "search.failing",
    "export.moved",
    "soup.chosen",
    "soup.trained",
    "search.taken",
)  # passed only after something else has happened
PASSED = [
    point for point in CRASH_POINTS if point.partition(".")[0] not in WORKS and point not in LATER
]
# Each is a study that is killed at one point after the other, in the order in which a study passes them.
CHAINS = (
    ("images.begun", "study.created", "search.asked", "checkpoint.begun", "confirm.kept"),
    ("images.filled", "file.begun", "search.drawn", "checkpoint.written", "default.tested"),
    ("images.renamed", "file.written", "activations.begun", "checkpoint.synced", "export.filled"),
    ("file.synced", "activations.filled", "checkpoint.renamed", "search.told:4", "export.written"),
    ("file.renamed", "activations.renamed", "search.reported", "search.repeating", "file.begun:2"),
    ("probe.begun", "search.files", "search.drawn:3", "file.renamed:2"),
    ("probe.filled", "search.told", "activations.filled:3", "export.renamed"),
    ("probe.renamed", "artifact.kept"),
)


# -- the list of points is the code's


def strings(call: ast.Call) -> list[str]:
    """The constant strings among a call's arguments."""
    return [
        a.value
        for a in (*call.args, *(k.value for k in call.keywords))
        if isinstance(a, ast.Constant) and isinstance(a.value, str)
    ]


CALLED = ("crash_point", "atomic_path", "atomic_folder")


@functools.cache
def called_functions() -> list[tuple[Path, ast.Call]]:
    """Every call of one of CALLED by its name in the package's code."""
    return [
        (path, node)
        for path in Path(tuner.__file__).parent.rglob("*.py")
        for text in [path.read_text()]
        if any(f"{name}(" in text for name in CALLED)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    for path, node in called_functions():
        if isinstance(node.func, ast.Name) and node.func.id == name:
            yield path, node


def test_every_point_of_the_code_is_listed_and_every_listed_one_is_in_the_code() -> None:
    there = {point for _, call in calls("crash_point") for point in strings(call)}
    steps = {
        "atomic_path": ("begun", "written", "synced", "renamed"),
        "atomic_folder": ("begun", "filled", "renamed"),
    }
    for name, expected in steps.items():
        inside = [
            a for _, call in calls("crash_point") for a in call.args if isinstance(a, ast.JoinedStr)
        ]
        assert len(inside) == sum(map(len, steps.values()))
        for _, call in calls(name):
            what = strings(call) or ["file"]
            assert len(what) == 1, ast.unparse(call)
            there |= {f"{what[0]}.{step}" for step in expected}
    assert there == set(CRASH_POINTS) and len(CRASH_POINTS) == len(set(CRASH_POINTS))


# -- a study


@pytest.fixture(scope="module")
def forking() -> Iterator[ForkServer]:
    with forks() as found:
        yield found


def begun(folder: Path, content: str = STUDY) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(content)
    return folder


@pytest.fixture(scope="module")
def calm(forking: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study as it ends undisturbed."""
    folder = begun(tmp_path_factory.mktemp("calm"))
    code, said = forking.tuner(folder, "run", "study.yaml")
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def calm_in_worker(forking: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a worker, which may have more threads: sums of more threads round differently."""
    folder = begun(tmp_path_factory.mktemp("calm_in_worker"))
    code, said = forking.tuner(folder, "run", "study.yaml", "engine.name=local")
    assert code == 0, said
    return folder


def trials(folder: Path, name: str = "s") -> list[tuple[Any, ...]]:
    """Parameters, state and epoch scores of the trials that ended, in the order of their draws; all others failed as orphans."""
    import optuna

    from tuner.search import storage

    study = optuna.load_study(
        study_name=name, storage=storage.open_storage(None, folder / "studies" / name)
    )
    for trial in study.trials:
        assert trial.state.name in ("COMPLETE", "PRUNED", "FAIL"), trial
        assert trial.state.name != "FAIL" or trial.user_attrs["tuner:reason"].startswith(
            ("orphaned", "worker ended")
        ), trial
    return [
        (t.params, t.state.name, t.intermediate_values, t.values)
        for t in study.trials
        if t.state.name != "FAIL"
    ]


def ended_alike(folder: Path, calm: Path) -> None:
    assert trials(folder) == trials(calm)
    found, expected = (
        manifest.read_export(folder / "studies/s/export"),
        manifest.read_export(calm / "studies/s/export"),
    )  # raises on a file that differs
    assert found is not None and expected is not None
    assert (
        found.manifest["files"]["model.safetensors"]
        == expected.manifest["files"]["model.safetensors"]
    )
    assert chosen(folder) == chosen(calm)
    for key in ("comparison", "confirmation", "soup"):
        assert without_numbers(found.manifest[key]) == without_numbers(expected.manifest[key])
    assert note(folder) == note(calm)
    with contextlib.closing(sqlite3.connect(folder / "studies/s/study.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    left = [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".old", ".lock")]
    assert [path for path in left if path.name != ".pins.lock"] == []


def without_numbers(value: Any) -> Any:
    """What a manifest says, but for the numbers of trials, which retries take."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in ("trial", "default_trial")}
        return {k: without_numbers(v) for k, v in kept.items()}
    return [without_numbers(v) for v in value] if isinstance(value, list) else value


def note(folder: Path) -> str:
    """What the dashboard says of the study, but for the numbers of trials."""
    import optuna

    from tuner.dashboard.artifacts import read_study_note
    from tuner.search import storage

    study = optuna.load_study(
        study_name="s", storage=storage.open_storage(None, folder / "studies" / "s")
    )
    attributes = study._storage.get_study_system_attrs(study._study_id)
    return re.sub(r"trial \d+", "trial", read_study_note(attributes))


def chosen(folder: Path) -> list[str]:
    """best.yaml, but for the trial's number, which retries take, and the engine."""
    return [
        line
        for line in (folder / "studies/s/best.yaml").read_text().splitlines()[1:]
        if not line.startswith("engine:")
    ]


def kill_in_turn(
    points: Sequence[str], forking: ForkServer, folder: Path, *words: str
) -> Iterator[str]:
    """The command killed at one point after the other, each time where the kill before left it; yields each point."""
    for point in points:
        code, said = forking.tuner(folder, *words, TUNER_CRASH_AT=point)
        assert code == 137, f"{point} was not passed: {said}"
        yield point


@pytest.mark.slow
@pytest.mark.parametrize("points", CHAINS, ids=" ".join)
def test_27_killed_at_points_and_started_again_a_study_ends_as_the_calm_one(
    points: tuple[str, ...], forking: ForkServer, calm: Path, tmp_path: Path
) -> None:
    begun(tmp_path)
    export = tmp_path / "studies/s/export"
    for _ in kill_in_turn(points, forking, tmp_path, "run", "study.yaml"):
        assert (
            not export.exists() or manifest.read_export(export) is not None
        )  # whole, or not there
    code, said = forking.tuner(tmp_path, "run", "study.yaml")
    assert code == 0, said
    ended_alike(tmp_path, calm)


def killed_beside_calm(
    content: str, points: Sequence[str], forking: ForkServer, place: Path
) -> tuple[Path, str]:
    """A study that is killed at the points and ends as an undisturbed one: its folder, and what the undisturbed one said."""
    calm, folder = begun(place / "calm", content), begun(place / "killed", content)
    code, said = forking.tuner(calm, "run", "study.yaml")
    assert code == 0, said
    list(kill_in_turn(points, forking, folder, "run", "study.yaml"))
    code, ending = forking.tuner(folder, "run", "study.yaml")
    assert code == 0, ending
    ended_alike(folder, calm)
    return folder, said


def test_every_point_that_the_study_passes_is_in_a_chain() -> None:
    assert {point for chain in CHAINS for point in chain if ":" not in point} == set(PASSED)


@pytest.mark.slow
def test_27_killed_while_a_soup_is_made_it_ends_as_the_calm_one(
    forking: ForkServer, tmp_path: Path
) -> None:
    # killed at the second `soup.trained` it has the weights of the first
    points = ("soup.chosen", "soup.trained", "soup.trained", "export.written")
    folder, said = killed_beside_calm(SOUP, points, forking, tmp_path)
    assert "weights  soup of trials " in said, said
    assert not list((folder / "studies/s/checkpoints").glob("soup-*"))


@pytest.mark.slow
def test_27_killed_with_the_whole_recipe_switched_on_it_ends_as_the_calm_one(
    forking: ForkServer, tmp_path: Path
) -> None:
    points = ("checkpoint.renamed:2", "confirm.kept", "checkpoint.renamed", "export.renamed")
    killed_beside_calm(EVERYTHING, points, forking, tmp_path)


@pytest.mark.slow
def test_27_killed_while_trials_are_taken_over_none_is_missing_and_none_is_there_twice(
    forking: ForkServer, calm: Path, tmp_path: Path
) -> None:
    words = ("run", "study.yaml", "search.name=t", "search.from=[s]", "recipe.lr=[0.001, 0.02]")
    words = (*words, "search.trials=2", "search.confirm=none", "search.compare=none")
    for name, crash in (("calm", {}), ("killed", {"TUNER_CRASH_AT": "search.taken:2"})):
        folder = Path(shutil.copytree(calm, tmp_path / name))
        code, said = forking.tuner(folder, *words, **crash)
        assert code == (137 if crash else 0), said
        if crash:
            code, said = forking.tuner(folder, *words)
            assert code == 0, said
    taken = [trial for trial in trials(tmp_path / "calm", "t") if trial[0]["lr"] == 0.001]
    assert len(taken) >= 2
    assert trials(tmp_path / "killed", "t") == trials(tmp_path / "calm", "t")


@pytest.mark.slow
def test_27_killed_again_while_the_first_kill_is_mended(
    forking: ForkServer, calm: Path, tmp_path: Path
) -> None:
    begun(tmp_path)
    points = ("search.reported:3", "search.requeued", "search.failing")
    list(kill_in_turn(points, forking, tmp_path, "run", "study.yaml"))
    code, said = forking.tuner(tmp_path, "run", "study.yaml")
    assert code == 0, said
    ended_alike(tmp_path, calm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "atomic"),
    [
        (("export.filled", "export.written", "export.renamed"), True),
        (("export.moved", "export.renamed"), False),
    ],
)
def test_27_killed_while_an_export_is_replaced_the_old_or_the_new_one_is_there(
    points: tuple[str, ...], atomic: bool, forking: ForkServer, calm: Path, tmp_path: Path
) -> None:
    shutil.copytree(calm, tmp_path, dirs_exist_ok=True)
    work = ("tests.faults.test_crash_points:export_once_more", atomic)
    for point in points:
        code, said = forking.call_function(tmp_path, *work, TUNER_CRASH_AT=point)
        assert code == 137, f"{point} was not passed: {said}"
        export = tmp_path / "studies/s/export"
        there = manifest.read_export(export if export.exists() else export.with_name(".export.old"))
        assert there is not None and ("torch_export" in there.manifest["exports"]) == (
            point == "export.renamed"
        )
    code, said = forking.call_function(tmp_path, *work)
    assert code == 0, said
    ended_alike(tmp_path, calm)


def export_once_more(atomic: bool) -> None:
    """A further format, whose file is made without a trace of the model, which takes seconds.

    `atomic`: whether the system can exchange two folders in one step.
    """
    from tuner import cli
    from tuner.export import safetensors, torch_export
    from tuner.files import removal

    torch_export.save, torch_export.load = safetensors.save, safetensors.load
    if not atomic:
        removal.exchanged = lambda one, other: False
    sys.argv = ["tuner", "export", "s", "--format", "torch_export"]
    cli.main()


@pytest.mark.slow
@pytest.mark.parametrize("point", ["activations.filled:4", "export.written"])
def test_27_a_worker_that_dies_at_a_point_is_noticed_and_replaced(
    point: str, forking: ForkServer, calm_in_worker: Path, tmp_path: Path
) -> None:
    begun(tmp_path)
    # the winner's job is tried again too, and its worker dies each time: once more shows it
    retries = 10 if point.startswith("activations") else 1
    words = ("run", "study.yaml", "engine.name=local", f"search.retries={retries}")
    code, said = forking.tuner(tmp_path, *words, TUNER_CRASH_AT=point)
    lost = failures(tmp_path)
    if point.startswith(
        "activations"
    ):  # each worker that comes after has fewer entries left to fill, and gets further
        assert lost and set(lost) == {"worker ended with exit code 137"}
    if code != 0:  # it died while the winner was made
        assert code == 3 and "a worker was lost" in said and "exit code 137" in said
        code, said = forking.tuner(tmp_path, *words)
    assert code == 0, said
    ended_alike(tmp_path, calm_in_worker)


def failures(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "studies/s/study.db")) as database:
        rows = database.execute(
            "select value_json from trial_user_attributes where key = 'tuner:reason'"
        )
        return [json.loads(value) for (value,) in rows]


# -- works, each passing the points of one kind


def timing(folder: str) -> list[str]:
    """What an example costs through a prefix, kept in a note."""
    import torch

    from tests.helpers.frozen_prefixes import CountingSource, make_frozen_prefix, make_linear_chain
    from tuner.training.cache_costs import measure_costs
    from tuner.training.frozen_prefix import UncachedSource

    place = Path(folder) / "activations"
    place.mkdir(exist_ok=True)
    found = measure_costs(
        UncachedSource(make_frozen_prefix(make_linear_chain(3)), CountingSource()), place
    )
    assert torch.get_num_threads() >= 1
    return sorted(found)


def downloading(folder: str) -> str:
    from tuner.files.atomic import remove_leftovers
    from tuner.files.downloads import download

    remove_leftovers(Path(folder))
    download(f"file://{folder}/origin", Path(folder) / "fetched", "weights")
    return hashlib.sha256((Path(folder) / "fetched").read_bytes()).hexdigest()


def pinning(folder: str) -> str:
    from tuner.core.weights import fetch_weights

    fetch_weights(Path(folder) / "home", f"file://{folder}/origin", name="origin")
    return (Path(folder) / "home/weights/pins.json").read_text()


def encoding(folder: str) -> list[int]:
    from tests.helpers import small_transformers
    from tuner.core.input_spec import TextInputSpec
    from tuner.preprocessing import tokenization

    place = Path(folder) / "bert"
    if not place.exists():
        small_transformers.write_model_folder(Path(folder), "bert", weights=False)
    wanted = TextInputSpec(str(place), 24, ("input_ids", "attention_mask"))
    return list(
        tokenization.open_token_store(
            Path(folder) / "home",
            wanted,
            [text for text, _ in small_transformers.make_corpus(20)],
            None,
        ).lengths.tolist()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKS)
def test_27_what_is_written_once_is_whole_or_absent_wherever_the_kill_comes(
    kind: str, forking: ForkServer, tmp_path: Path
) -> None:
    """Killed at one point after the other, each time where the kill before left it."""
    (tmp_path / "origin").write_bytes(b"weights")
    work = f"tests.faults.test_crash_points:{WORKS[kind]}"
    for point in (point for point in CRASH_POINTS if point.partition(".")[0] == kind):
        code, said = forking.call_function(tmp_path, work, str(tmp_path), TUNER_CRASH_AT=point)
        assert code == 137, f"{point} was not passed: {said}"
    code, said = forking.call_function(tmp_path, work, str(tmp_path))
    assert code == 0, said
    other = tmp_path / "undisturbed"
    other.mkdir()
    (other / "origin").write_bytes(b"weights")
    code, expected = forking.call_function(other, work, str(other))
    assert code == 0 and said == expected

"""examples/plugins: each plug-in takes part in a real search, and keeps the laws of its kind."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CommandResult
from tests.helpers.split_laws import check_partition, check_split
from tuner.config.data_options import ImageOptions
from tuner.config.run import EngineSettings, PluginConfig, Recipe
from tuner.core.input_spec import IMAGENET_SPEC
from tuner.core.types import Batch
from tuner.errors import DataError, SpaceError
from tuner.jobs import Job, Outcome
from tuner.training.building import input_spec_of

FOLDER = Path(__file__).parents[2] / "examples" / "plugins"
QUICK = ("recipe.epochs=1", "model.width=4", "export=[safetensors]")
Tuner = Callable[..., CommandResult]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)


def make_dots(images: int) -> Path:
    importlib.import_module("make_dots").main(Path("dots"), images)
    return Path("dots/dots.csv")


def test_task_data_and_model_search_train_export_and_predict(tuner: Tuner, tmp_path: Path) -> None:
    make_dots(40)
    search = tuner("run", FOLDER / "space.yaml", "search.trials=2", *QUICK)
    assert search.code == 0, search.err
    study = tmp_path / "studies/dots"
    manifest = json.loads((study / "export/manifest.json").read_text())
    assert manifest["classes"] == ["one", "two", "three", "four", "five"]  # the order of the file
    assert manifest["preprocess"]["size"] == 32 and manifest["preprocess"]["mean"] == [0.5] * 3
    scores = manifest["scores"]["test"]
    assert set(scores) == {"negative_mean_absolute_error", "accuracy"}
    assert -4 <= scores["negative_mean_absolute_error"] <= 0
    files = [path.read_bytes() for path in (study / "artifacts").rglob("*") if path.is_file()]
    assert any(file.startswith(b"class,examples,mean_absolute_error\none,") for file in files)
    answer = tuner("predict", "dots", "dots/0000.png", "--trust")
    assert answer.code == 0 and any(word in answer.out for word in manifest["classes"]), answer.err


@pytest.mark.slow
def test_the_engine_carries_out_a_search_in_new_processes(tuner: Tuner, tmp_path: Path) -> None:
    make_dots(40)
    words = ("search.trials=1", "engine.name=fresh_process:run", *QUICK)
    search = tuner("run", FOLDER / "space.yaml", *words)
    assert search.code == 0, search.err
    assert (tmp_path / "studies/dots/export/manifest.json").exists()


def run_one(
    job: Job, on_report: Callable[[Job, Any], bool], should_continue: Callable[[], bool]
) -> Outcome:
    """How a job ends that the example engine carries out."""
    engine = importlib.import_module("fresh_process")
    ends: list[tuple[Job, Outcome]] = []
    jobs = iter([job])
    with engine.run(EngineSettings(), pytest.fail) as run_jobs:
        run_jobs(
            lambda: next(jobs, None),
            on_report,
            lambda job, outcome: ends.append((job, outcome)),
            should_continue,
            1,
        )
    ((ended, outcome),) = ends
    assert ended is job
    return outcome


def test_the_engine_keeps_the_protocol() -> None:
    reports: list[Any] = []

    def hear(job: Job, value: Any) -> bool:
        reports.append(value)
        return len(reports) < 2

    counted = run_one(Job(0, "tests.helpers.jobs:count", 3), hear, lambda: True)
    assert (counted.kind, counted.value, reports) == ("done", 2, [1, 2])  # the answer ends the job
    pid = run_one(Job(0, "tests.helpers.jobs:pid", None), hear, lambda: True)
    assert pid.value != os.getpid()
    refused = run_one(Job(0, "tests.helpers.jobs:refuse", "no"), hear, lambda: True)
    assert (refused.kind, refused.exit_code, refused.problems[0]) == ("refused", 3, "no")
    killed = run_one(Job(0, "tests.helpers.jobs:die", signal.SIGKILL), hear, lambda: True)
    assert (killed.kind, killed.loss_cause) == ("lost", "memory")
    left = run_one(Job(0, "tests.helpers.jobs:leave", 3), hear, lambda: True)
    assert (left.kind, left.loss_cause, left.reason) == ("lost", "died", "ended with code 3")


def test_the_engine_ends_its_process_when_it_is_asked_to_and_when_the_coordinator_fails(
    tmp_path: Path,
) -> None:
    pids: list[int] = []

    def hear(job: Job, value: Any) -> bool:
        pids.append(value)
        return True

    job = Job(0, "tests.helpers.jobs:hang", str(tmp_path / "file"))
    interrupted = run_one(job, hear, lambda: not pids)
    assert (interrupted.kind, interrupted.loss_cause) == ("lost", "interrupted")

    def fail(job: Job, value: Any) -> bool:
        pids.append(value)
        raise LookupError("the coordinator's own")

    with pytest.raises(LookupError):
        run_one(job, fail, lambda: True)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len(pids) == 2


def test_the_engine_loads_no_torch() -> None:
    code = "import sys, fresh_process; print('torch' in sys.modules, 'tuner.api' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_model_keeps_the_cut_and_partition_laws(blocks: int) -> None:
    torch.manual_seed(0)
    staged = importlib.import_module("small_cnn").build(3, width=4, blocks=blocks)
    assert staged.max_depth == blocks
    check_partition(staged)
    check_split(staged, torch.randn(4, 3, 32, 32))


def test_a_model_states_its_input_spec_beside_it(tmp_path: Path) -> None:
    (tmp_path / "spec_of_own.py").write_text(
        "from dataclasses import replace\nfrom tuner.api import IMAGENET_SPEC\n"
        "def input_spec(*, size=8):\n    return replace(IMAGENET_SPEC, size=size, resize=size)\n"
        "def build(outputs, *, size=8, width=4): ...\n"
    )
    sizes = {size: PluginConfig("spec_of_own:build", {"size": size, "width": 4}) for size in (8, 9)}
    assert [input_spec_of(model).size for model in sizes.values()] == [8, 9]  # type: ignore[attr-defined]
    plain = PluginConfig("tests.helpers.counting_model:build_counted_model", {})
    assert input_spec_of(plain) == IMAGENET_SPEC


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "input_spec = 3",
            r"input_spec in the same module failed \(TypeError: 3 is not a callable",
        ),
        ("def input_spec(): raise KeyError('mean')", r"failed \(KeyError: 'mean'\)"),
        ("from tuner.api import *\ndef input_spec(): raise SpaceError('no')", "^no$"),
        ("def input_spec(): return (32, 32)", r"returned tuple; expected a tuner\.api\.ImageInput"),
    ],
)
def test_a_faulty_input_spec_is_refused_with_its_place(
    line: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "faulty_spec", raising=False)
    (tmp_path / "faulty_spec.py").write_text(f"{line}\ndef build(outputs): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpaceError, match=problem):
        input_spec_of(PluginConfig("faulty_spec:build", {}))
    del sys.modules["faulty_spec"]


def test_the_task_prefers_near_classes_and_refuses_what_it_has_no_use_for() -> None:
    ordinal = importlib.import_module("ordinal")
    task = ordinal.build(("low", "middle", "high"), Recipe())
    logits = 9 * torch.eye(3)
    truth = torch.tensor([0, 0, 0])
    assert task.score([(logits, truth)]) == {
        "negative_mean_absolute_error": -1.0,
        "accuracy": pytest.approx(1 / 3),
    }
    right, near, far = (
        float(task.loss(torch.nn.Identity(), Batch(logits[[i]], truth[:1]))) for i in range(3)
    )
    assert 0 <= right < 0.01 and near > 0.9 and far > 1.9  # with cross-entropy near equals far
    with pytest.raises(SpaceError, match=r"recipe\.label_smoothing"):
        ordinal.build(("low", "high"), Recipe(label_smoothing=0.1))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name,label\na.png,x\n", "list.csv:1: no column file"),
        ("file,label\na.png,\n", "list.csv:2: file and label are needed in every row"),
        ("file,label\na.png,one\nb.png,tow\n", "list.csv:3: label 'tow' is not a class; did you"),
        ("file,label,split\na.png,one,tset\n", "list.csv:2: split 'tset'; did you mean 'test'?"),
    ],
)
def test_the_data_source_names_the_faulty_row(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text(text)
    load = importlib.import_module("file_list").load
    with pytest.raises(DataError) as caught:
        load(
            tmp_path,
            IMAGENET_SPEC,
            "classification",
            path=str(file),
            classes=["one", "two"],
            image=ImageOptions(),
        )
    assert problem in str(caught.value)

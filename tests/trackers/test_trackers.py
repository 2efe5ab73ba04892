"""What the trackers' own libraries read back of a search."""

import io
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import SMALL, CommandResult
from tests.helpers.instant_engine import carry_out_without_training
from tests.helpers.tracked_search import TrackedSearch
from tuner.deferred_figures import defer_figure
from tuner.jobs import Job, Outcome
from tuner.search.coordinator import Coordinator
from tuner.trackers.mlflow import allowed_name


def train_with_pictures(c: Coordinator, job: Job) -> Outcome:
    """The outcome of a training, with a picture that is to be drawn and a table."""
    outcome = carry_out_without_training(c, job)
    epochs = outcome.value.epochs
    curve = defer_figure(
        "curve",
        losses=[epoch.loss for epoch in epochs],
        scores=[epoch.scores for epoch in epochs],
        metric="accuracy",
        direction="maximise",
    )
    files = {"curve.png": curve, "per_class.csv": b"class,recall\ncat,1\n"}
    return Outcome("done", replace(outcome.value, artifacts=files))


def test_tensorboard_reads_curves_parameters_pictures_and_ends_once_after_a_kill(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    search = TrackedSearch(tmp_path, "tensorboard", trials=3, seed=1)
    coordinator, tracking = search.open()
    job = coordinator.next_job()
    assert job is not None
    train_with_pictures(coordinator, job)  # its epochs are told, its end is not: killed
    tracking.close()
    coordinator.on_job_end(job, Outcome("lost", reason="killed", loss_cause="died"))
    assert (tmp_path / "tensorboard" / "trial-0000").is_dir()
    search.run(train_with_pictures)
    assert search.console.warnings == []

    ended = [trial for trial in search.study.get_trials() if trial.state.name != "FAIL"]
    folders = sorted((tmp_path / "tensorboard").glob("trial-*"))
    assert [folder.name for folder in folders] == ["trial-0000", "trial-0001", "trial-0002"]
    assert len(list(folders[0].iterdir())) == 2  # a file of each command
    ended.sort(key=lambda trial: int(trial.user_attrs.get("tuner:proposal", trial.number)))
    for folder, trial in zip(folders, ended, strict=True):
        read = EventAccumulator(str(folder))
        read.Reload()
        curve = {event.step: event.value for event in read.Scalars("valid/accuracy")}
        assert len(curve) == len(read.Scalars("valid/accuracy")), "an epoch is there twice"
        assert curve == pytest.approx(trial.intermediate_values)
        assert [e.value for e in read.Scalars("train/loss")] == [1.0] * len(curve)
        (best,) = read.Scalars("best/accuracy")
        assert best.value == pytest.approx(max(trial.intermediate_values.values()))
        (picture,) = read.Images("curve")
        assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (
            picture.width,
            picture.height,
        )
        plugin = read.PluginTagToContent("hparams")
        begun = metadata.parse_session_start_info_plugin_data(
            plugin[metadata.SESSION_START_INFO_TAG]
        )
        assert begun.hparams["lr"].number_value == pytest.approx(trial.params["lr"])
        assert begun.hparams["optimizer"].string_value == trial.params["optimizer"]
        assert metadata.SESSION_END_INFO_TAG in plugin
        (state,) = read.Tensors("state")
        assert state.tensor_proto.string_val[0].decode() == trial.state.name.lower()


def read_values(client: Any, run: Any, name: str) -> dict[int, float]:
    history = client.get_metric_history(run.info.run_id, name)
    values = {metric.step: metric.value for metric in history}
    assert len(values) == len(history), f"a step of {name} is there twice"
    return values


def test_mlflow_takes_the_names_of_keys_with_several_ranges() -> None:
    allowed = re.compile(r"[/\w.\- :]+")  # as mlflow.utils.validation has it
    names = ["lr[sgd]", "lr[adam|adamw, epochs=3]", "model.name", "valid/mymetrics:cost"]
    assert all(allowed.fullmatch(allowed_name(name)) for name in names)
    assert allowed_name("lr[sgd]") == "lr.sgd" and allowed_name("model.name") == "model.name"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of MLflow with SQLAlchemy 2.1
def test_mlflow_has_a_run_a_trial_under_one_parent_and_continues_it_after_a_kill(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    search = TrackedSearch(tmp_path, "mlflow", trials=3, seed=1)
    coordinator, tracking = search.open()
    job = coordinator.next_job()
    assert job is not None
    train_with_pictures(coordinator, job)
    tracking.close()
    coordinator.on_job_end(job, Outcome("lost", reason="killed", loss_cause="died"))
    search.run(train_with_pictures)
    assert search.console.warnings == []

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("t")
    runs = {
        run.data.tags["tuner.run"]: run for run in client.search_runs([experiment.experiment_id])
    }
    assert sorted(runs) == ["study", "trial-0000", "trial-0001", "trial-0002"]
    assert runs["study"].data.params["model.name"] == "resnet18_slim"
    trials = {str(trial.number): trial for trial in search.study.get_trials()}
    for key, run in runs.items():
        assert run.info.status == "FINISHED"
        if key == "study":
            continue
        trial = trials[run.data.tags["tuner.trial"]]
        assert run.data.tags["mlflow.parentRunId"] == runs["study"].info.run_id
        assert run.data.tags["tuner.state"] == trial.state.name.lower()
        assert run.data.params == {name: str(value) for name, value in trial.params.items()}
        assert read_values(client, run, "valid/accuracy") == pytest.approx(
            trial.intermediate_values
        )
        names = [file.path for file in client.list_artifacts(run.info.run_id)]
        assert names == ["curve.png", "per_class.csv"]


def read_offline_run(path: Path) -> Iterator[Any]:
    """The records of a file that W&B keeps offline: protocol buffers in the format of LevelDB's
    log, whose blocks of 32 KiB begin, but for the first one, without a header.
    """
    from wandb.proto import wandb_internal_pb2

    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_search_is_kept_offline_by_wandb_and_by_mlflow_with_the_winners_test(
    tmp_path: Path, tuner: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing must be sent
    (tmp_path / "t.yaml").write_text(f"{SMALL}track: [wandb, mlflow]\n")
    said = tuner("run", "t.yaml", "search.trials=2")
    assert said.code == 0 and "track:" not in said.err, said.err
    said = tuner("run", "t.yaml", "search.trials=3")
    assert said.code == 0 and "track:" not in said.err, said.err

    client = MlflowClient(f"sqlite:///{tmp_path}/studies/t/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("t")
    runs = {
        run.data.tags["tuner.run"]: run for run in client.search_runs([experiment.experiment_id])
    }
    assert sorted(runs) == ["study", "trial-0000", "trial-0001", "trial-0002", "winner"]
    accuracy = runs["winner"].data.metrics["test/accuracy"]

    kept: dict[str, list[Any]] = {}
    for path in sorted((tmp_path / "studies/t/wandb").glob("offline-run-*/*.wandb")):
        kept.setdefault(path.stem.partition("-")[2].partition("-")[2], []).extend(
            read_offline_run(path)
        )
    assert sorted(kept) == ["trial-0000", "trial-0001", "trial-0002", "winner"]
    for key, records in kept.items():
        begun = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert begun.run_group == "t" and begun.project == "tuner"
        assert "lr" in [item.key for item in begun.config.update]
        logged = [r.history for r in records if r.WhichOneof("record_type") == "history"]
        losses = [i for h in logged for i in h.item if "train/loss" in (i.key, *i.nested_key)]
        assert len(losses) == (
            0 if key == "winner" else len(read_values(client, runs[key], "train/loss"))
        )
        summary = {
            "/".join(item.nested_key) or item.key: item.value_json
            for r in records
            if r.WhichOneof("record_type") == "summary"
            for item in r.summary.update
        }
        assert summary["state"] == '"complete"'
        if key == "winner":
            assert float(summary["test/accuracy"]) == pytest.approx(accuracy)
    images = list((tmp_path / "studies/t/wandb").glob("offline-run-*/files/media/images/*.png"))
    assert len(images) >= 3
    shutil.rmtree(tmp_path / "studies/t/wandb")


@pytest.mark.filterwarnings("ignore")  # those of the web server that it loads
def test_trackio_reads_curves_parameters_pictures_and_ends_once_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "runs"))  # as it reads it once in a process
    trackio = pytest.importorskip("trackio")

    search = TrackedSearch(tmp_path, "trackio", trials=3, seed=1)
    coordinator, tracking = search.open()
    job = coordinator.next_job()
    assert job is not None
    train_with_pictures(coordinator, job)
    tracking.close()
    coordinator.on_job_end(job, Outcome("lost", reason="killed", loss_cause="died"))
    search.run(train_with_pictures)
    assert search.console.warnings == [] and capsys.readouterr().out == ""

    trials = {trial.number: trial for trial in search.study.get_trials()}
    runs = {run.name: run for run in trackio.Api().runs("t")}
    assert sorted(runs) == ["trial-0000", "trial-0001", "trial-0002"]
    for run in runs.values():
        trial = trials[run.config["trial"]]
        assert run.config["lr"] == trial.params["lr"]
        assert run.config["model.name"] == "resnet18_slim"
        logs = trackio.sqlite_storage.SQLiteStorage.get_logs("t", run.name, run_id=run.id)
        scores = [(log["step"], log["valid/accuracy"]) for log in logs if "valid/accuracy" in log]
        assert dict(scores) == pytest.approx(trial.intermediate_values)
        assert len(scores) == len(trial.intermediate_values), "an epoch is there twice"
        (end,) = [log for log in logs if "state" in log]
        assert end["state"] == trial.state.name.lower()
        assert end["best/accuracy"] == pytest.approx(max(dict(scores).values()))
        path = tmp_path / "runs/media" / end["curve"]["file_path"]
        assert Image.open(path).size[0] > 100

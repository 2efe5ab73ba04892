"""MLflow: an experiment with the study's name, in it a parent run, and a child run a trial.

Runs lie in a SQLite database in the study's `mlflow/`, or where MLFLOW_TRACKING_URI says.
`mlflow ui --backend-store-uri sqlite:///studies/NAME/mlflow/mlflow.db` shows them.
"""

import logging
import os
import re
from typing import Any

from tuner.files import removal
from tuner.messages import Epoch
from tuner.trackers._tracked import RunEnd, TrackedRun, TrackedStudy, epoch_values, own_folder

PACKAGE = "mlflow"
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
PARENT = "study"  # the key of the run that has all others
OTHER_CHARACTERS = re.compile(r"[^/\w.\- :]")  # than those of the names of MLflow
MAX_VALUE = 6000  # characters of a parameter


def start(study: TrackedStudy) -> "MlflowTracker":
    return MlflowTracker(study)


class MlflowTracker:
    """Finds a run again by its tags, so a trial that is continued goes on in its run."""

    def __init__(self, study: TrackedStudy) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves this machine
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # tables that it makes
        self.study, self.make_metric, self.make_param = study, Metric, Param
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            folder = own_folder(study, "mlflow").absolute()
            uri, artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri()
        self.client: Any = MlflowClient(uri)
        experiment = self.client.get_experiment_by_name(study.name)
        self.experiment_id = (
            self.client.create_experiment(study.name, artifacts)
            if experiment is None
            else experiment.experiment_id
        )
        self.runs: dict[str, tuple[str, set[int]]] = {}  # key -> MLflow's id, and known epochs
        self.parent = self._open(PARENT, study.name, {}, study.settings)

    def log_epoch(self, run: TrackedRun, epoch: Epoch) -> None:
        run_id, known = self._run(run)
        if epoch.number not in known:
            self._log_values(run_id, epoch_values(epoch), epoch.number)
            known.add(epoch.number)

    def end_run(self, run: TrackedRun, end: RunEnd) -> None:
        run_id, _ = self._run(run)
        self._log_values(run_id, end.scores, end.steps)
        self.client.set_tag(run_id, "tuner.state", end.state)
        if end.reason:
            self.client.set_tag(run_id, "tuner.reason", end.reason)
        with removal.scratch() as folder:
            for name, content in end.files.items():
                (folder / name).write_bytes(content)
                self.client.log_artifact(run_id, str(folder / name))
        self.client.set_terminated(run_id, STATUS[end.state])
        del self.runs[run.key]

    def close(self) -> None:
        for run_id, _ in self.runs.values():
            self.client.set_terminated(run_id, "KILLED")
        self.client.set_terminated(self.parent, "FINISHED")

    def _run(self, run: TrackedRun) -> tuple[str, set[int]]:
        """MLflow's id of a run, and the numbers of the epochs that it has."""
        if run.key not in self.runs:
            tags = {"mlflow.parentRunId": self.parent, "tuner.trial": str(run.number)}
            run_id = self._open(run.key, run.title, tags, run.params)
            history = self.client.get_metric_history(run_id, "train/loss")
            self.runs[run.key] = run_id, {metric.step for metric in history}
        return self.runs[run.key]

    def _open(self, key: str, title: str, tags: dict[str, str], params: Any) -> str:
        """MLflow's id of the run with this key, which is made where there is none."""
        own = {"tuner.study": self.study.identifier, "tuner.run": key}
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in own.items())
        found = self.client.search_runs([self.experiment_id], wanted, max_results=1)
        if found:
            run_id = str(found[0].info.run_id)
            self.client.update_run(run_id, status="RUNNING")
            for name, value in tags.items():
                self.client.set_tag(run_id, name, value)
            return run_id
        run = self.client.create_run(self.experiment_id, tags={**own, **tags}, run_name=title)
        listed = [
            self.make_param(allowed_name(name), str(value)[:MAX_VALUE])
            for name, value in params.items()
        ]
        self.client.log_batch(run.info.run_id, params=listed)
        return str(run.info.run_id)

    def _log_values(self, run_id: str, values: Any, step: int) -> None:
        metrics = [
            self.make_metric(allowed_name(name), value, 0, step) for name, value in values.items()
        ]
        self.client.log_batch(run_id, metrics=metrics)


def allowed_name(name: str) -> str:
    """A name as MLflow takes it, which has no brackets, bars or commas: `lr.sgd` for `lr[sgd]`."""
    return OTHER_CHARACTERS.sub("_", name.replace("[", ".").removesuffix("]"))

"""What is read in bulk is what Optuna reads, to the last value; and the page is told what Optuna's own dashboard would tell it."""

import json
import math
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.helpers.dashboard_requests import browse
from tuner.dashboard import cost_plot, server, study_json
from tuner.dashboard.artifacts import write_note
from tuner.search import storage
from tuner.search.bulk_reads import use_bulk_reads

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Some regimes for parameter"),
]
optuna.logging.set_verbosity(optuna.logging.ERROR)


def carried_out(study: optuna.Study, number: int, folder: Path) -> None:
    """A trial of a kind that its number decides: every state, every kind of value."""
    trial = study.ask()
    trial.suggest_float("lr", 1e-4, 0.1, log=True)
    if trial.suggest_categorical("optimizer", ["sgd", "adamw", None, 3]) == "sgd":
        trial.suggest_float("momentum", 0.5, 0.9, step=0.1)
    trial.suggest_int("epochs", 1, 9 + number % 2)
    trial.set_user_attr("scores", {"accuracy": number / 9, "words": "x" * 2000})
    trial.set_user_attr("flag" if number % 2 else "count", number % 2 == 1 or number)
    for step, value in enumerate((0.1, math.inf, -math.inf, math.nan, number / 9), 1):
        trial.report(value, step)
    if number % 3 == 0:
        store = optuna.artifacts.FileSystemArtifactStore(folder / "artifacts")
        optuna.artifacts.upload_artifact(
            artifact_store=store, file_path=str(folder / "space.yaml"), study_or_trial=trial
        )
        write_note(study, trial, f"# trial {number}\n" + "long " * 1000)
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE, None]
    state = states[number % 5]
    if state is not None:
        values = (
            [[math.inf, -math.inf, number / 9][number % 3]]
            if state == TrialState.COMPLETE
            else None
        )
        study.tell(trial, values, state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with trials of all kinds, beside somebody else's in the same database."""
    folder = tmp_path_factory.mktemp("bulk") / "studies" / "all"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "space.yaml").write_text("")
    database = storage.open_storage(None, folder)
    other = optuna.create_study(storage=database, study_name="other", direction="minimize")
    other.tell(other.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), 1.0)
    study = optuna.create_study(
        storage=database,
        study_name="all",
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    study.set_user_attr(storage.SPACE_ATTRIBUTE, "{}")
    study.set_metric_names(["accuracy"])
    write_note(study, None, "what it is for")
    study.enqueue_trial({"lr": 0.01}, user_attrs={"tuner:root": 3})
    for number in range(12):
        carried_out(study, number, folder)
    study.enqueue_trial({"lr": 0.02, "optimizer": None})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, for what changes things."""
    return Path(shutil.copytree(whole, tmp_path / "studies" / "all"))


@pytest.fixture
def made(folder: Path) -> optuna.Study:
    return optuna.load_study(
        study_name="all",
        storage=storage.open_storage(None, folder),
        sampler=optuna.samplers.RandomSampler(seed=0),
    )


def everything(trial: optuna.trial.FrozenTrial) -> str:
    """In words, where NaN equals itself. Attributes in any order: Optuna asks the database for none."""
    return repr(
        {
            name: sorted(value.items()) if "attrs" in name else value
            for name, value in sorted(vars(trial).items())
        }
    )


def own(folder: Path) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db")


@pytest.mark.parametrize(
    ("states", "included", "after"),
    [
        (None, set(), -1),
        (None, {3, 5}, 8),
        (None, set(), 8),
        (None, set(), 10_000),
        ((TrialState.COMPLETE, TrialState.RUNNING), set(), -1),
        ((), set(), -1),
    ],
)
def test_trials_are_read_as_optuna_reads_them(
    states: tuple[TrialState, ...] | None, included: set[int], after: int, folder: Path
) -> None:
    bulk, optunas = use_bulk_reads(own(folder)), own(folder)
    for study in (1, 2):
        found, wanted = (s._get_trials(study, states, included, after) for s in (bulk, optunas))
        assert [everything(t) for t in found] == [everything(t) for t in wanted]
        assert [list(t.params) for t in found] == [list(t.params) for t in wanted]
    assert {t.state for t in optunas.get_all_trials(2)} == set(
        TrialState
    )  # none was left out of the comparison


def test_studies_are_read_as_optuna_reads_them(folder: Path) -> None:
    optuna.create_study(
        storage=own(folder), study_name="several", directions=["minimize", "maximize"]
    )
    found, wanted = use_bulk_reads(own(folder)).get_all_studies(), own(folder).get_all_studies()
    assert found == wanted and len(found) == 3


def test_a_study_that_is_not_there_is_the_same_error(folder: Path) -> None:
    for database in (use_bulk_reads(own(folder)), own(folder)):
        with pytest.raises(KeyError, match="Record does not exist"):
            database.get_all_trials(99)


@pytest.fixture
def apps(folder: Path) -> tuple[server.App, server.App]:
    """tuner's dashboard, and Optuna's own over Optuna's own storage."""
    import optuna_dashboard

    store = optuna.artifacts.FileSystemArtifactStore(folder / "artifacts")
    return server.make_app(
        server.open_read_only(None, folder), folder / "artifacts", 2
    ), optuna_dashboard.wsgi(optuna.storages.get_storage(own(folder)), artifact_store=store)


def told(app: server.App, path: str) -> tuple[int, str, Any]:
    """An answer without the plot that is tuner's own."""
    answer = browse(app, path)
    tree = json.loads(answer.body)
    if "plotly_graph_objects" in tree:
        plots = tree["plotly_graph_objects"]
        tree["plotly_graph_objects"] = [plot for plot in plots if plot["id"] != cost_plot.NAME]
    for part in [tree, *tree.get("trials", ()), *tree.get("best_trials", ())]:
        for key in {"user_attrs", "union_user_attrs", "artifacts"} & part.keys():
            part[key].sort(key=json.dumps)  # in no order
    return answer.status, answer.headers["Content-Type"], tree


@pytest.mark.parametrize(
    "path",
    [
        "/api/studies/2?after=0",
        "/api/studies/2?after=5",
        "/api/studies/2?after=100",
        "/api/studies/2",
        "/api/studies/2?after=-1",
        "/api/studies/99?after=0",
        "/api/studies/2/param_importances",
    ],
)
def test_the_page_is_told_what_optunas_dashboard_tells(
    path: str, apps: tuple[server.App, server.App]
) -> None:
    ours, optunas = (told(app, path) for app in apps)
    assert ours == optunas


def test_what_changes_is_told_anew(
    made: optuna.Study,
    folder: Path,
    apps: tuple[server.App, server.App],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import optuna_dashboard

    monkeypatch.setattr(
        "optuna_dashboard._storage.timedelta", lambda seconds: timedelta(seconds=-1)
    )  # nothing is young enough to be kept
    before = [told(app, "/api/studies/2?after=0") for app in apps]
    running = next(t for t in made.trials if t.state == TrialState.RUNNING)
    made.tell(running.number, 3.0)
    carried_out(made, 4, folder)
    optuna_dashboard.save_note(made, "another purpose")
    made._storage.set_study_system_attr(
        made._study_id, f"dashboard:{made.trials[1]._trial_id}:note_str:0", "another note"
    )
    for path in ("/api/studies/2?after=0", "/api/studies/2?after=9"):
        ours, optunas = (told(app, path) for app in apps)
        assert ours == optunas and ours != before[0]


def test_with_many_trials_the_chart_of_all_curves_goes_and_all_else_stays(
    apps: tuple[server.App, server.App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_json, "MAX_CURVES", 10)
    ours, optunas = (told(app, "/api/studies/2?after=0")[2] for app in apps)
    assert not ours["has_intermediate_values"] and optunas["has_intermediate_values"]
    assert ours | {"has_intermediate_values": True} == optunas


def test_the_page_is_read_before_it_is_announced(
    made: optuna.Study, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    real = study_json.StudyJson.render
    monkeypatch.setattr(
        study_json.StudyJson, "render", lambda self, after: said.append("read") or real(self, after)
    )
    monkeypatch.setattr(server._HttpServer, "serve_forever", lambda self: None)
    server.serve(folder, None, 0, allow_writes=False, announce=said.append)
    assert said[0] == "read" and "/dashboard/studies/2?token=" in said[-1]

"""Studies for a metric that is minimised, or that is the user's own, from the file to the model card."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from tests.conftest import CommandResult
from tests.helpers.dashboard_requests import browse
from tuner.dashboard import server
from tuner.search import history, storage

Tuner = Callable[..., CommandResult]
COST = '''
def cost(predictions, targets):
    """Missing class 0 costs five times as much as other mistakes."""
    wrong = predictions.argmax(1) != targets
    return float((wrong * (1 + 4 * (targets == 0))).double().mean())


cost.minimised = True
'''


@pytest.fixture(params=[pytest.param("log_loss", marks=pytest.mark.slow), "my_cost:cost"])
def metric(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_cost.py").write_text(COST)
    monkeypatch.syspath_prepend(str(tmp_path))
    return str(request.param)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.usefixtures("quick_program")
def test_a_study_that_minimises_from_its_file_to_its_model_card(
    tuner: Tuner, small: Path, metric: str
) -> None:
    words = (f"search.metric='{metric}'", "data.noise=3", "search.trials=3")
    run = tuner("run", small, *words)
    assert run.code == 0, run.err
    folder = small.parent / "studies" / "small"
    label = metric.rpartition(":")[2].replace("_", " ")

    study = optuna.load_study(study_name="small", storage=storage.open_storage(None, folder))
    values = {t.number: t.value for t in history.completed_trials(study)}
    winner = history.best_trial(study)[0]
    assert winner.value == min(values.values()) != max(values.values())
    assert winner.value == min(winner.intermediate_values.values())  # its best epoch

    best = f"best     #{winner.number}, validation {label} {winner.value:.4f} in"
    assert best in run.out and f"(best {winner.value:.4f} #{winner.number})" in run.out
    default = history.default_trial(study)
    assert default is not None and default.value is not None
    if default.number != winner.number:
        above = f"{default.value - winner.value:.4f} above the best"
        assert above in run.out

    again = yaml.safe_load((folder / "best.yaml").read_text())["search"]
    assert (again["metric"], again["direction"]) == (metric, "minimise")
    manifest = json.loads((folder / "export" / "manifest.json").read_text())
    assert (manifest["metric"], manifest["direction"]) == (metric, "minimise")
    assert manifest["scores"]["valid"][metric] == winner.value
    assert 0 <= manifest["scores"]["test"][metric] < 10
    card = (folder / "export" / "MODEL_CARD.md").read_text()
    assert f"searched for the lowest {label}." in card and f"| {label} | " in card

    per_class = manifest["scores"]["per_class"]
    assert list(per_class) == manifest["classes"] and len(per_class) == 3
    assert sum(c["examples"] for c in per_class.values()) == manifest["examples"]["test"]
    recalls = [c["recall"] for c in per_class.values()]
    mean = manifest["scores"]["test"]["balanced_accuracy"]
    assert sum(recalls) / 3 == pytest.approx(mean, abs=1e-6)
    for name, c in per_class.items():
        assert f"| {name} | {c['precision']:.4f} | {c['recall']:.4f} | {c['f1']:.4f} |" in card

    app = server.make_app(storage.open_storage(None, folder), folder / "artifacts", 1)
    shown = json.loads(browse(app, "/api/studies/1?after=0").body)
    assert shown["directions"] == ["minimize"]
    assert [t["number"] for t in shown["best_trials"]] == [winner.number]

    exported = tuner("export", "small", "--format", "torch_export")
    assert exported.code == 0, exported.err
    manifest = json.loads((folder / "export" / "manifest.json").read_text())
    assert manifest["trial"] == winner.number and "torch_export" in manifest["exports"]


def test_a_metric_that_says_nothing_of_so_few_classes_is_refused_before_anything_is_made(
    tuner: Tuner, small: Path
) -> None:
    checked = tuner("check", small, "search.metric=top_3")
    assert checked.code == 2
    assert re.search(r"search.metric: top_3 says nothing with 3 classes; choose one", checked.err)


def test_a_metric_that_fails_ends_the_search_with_its_reason(
    tuner: Tuner, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.parent / "broken_cost.py").write_text("def cost(predictions, targets): return 0 / 0")
    monkeypatch.syspath_prepend(str(small.parent))
    run = tuner("run", small, "search.metric='broken_cost:cost'", "recipe.epochs=1")
    assert run.code == 2 and "(ZeroDivisionError: division by zero)" in run.err


def test_the_ring_of_a_curve_is_at_its_lowest_value(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    from tuner.dashboard.plots import plot_learning_curve

    titles: list[Any] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **_: titles.append(text))
    scores = [{"log_loss": value} for value in (0.9, 0.4, 0.6)]
    plot_learning_curve([3.0, 2.0, 1.0], scores, "log_loss", "minimise")
    plot_learning_curve([3.0, 2.0, 1.0], scores, "log_loss")
    assert titles == ["best: 0.4000 in epoch 2 of 3", "best: 0.9000 in epoch 1 of 3"]

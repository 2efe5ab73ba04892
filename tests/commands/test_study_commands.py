"""`tuner ls`, `trials`, `show` and `compare` tell of a real study what its database and export say."""

import csv
import errno
import io
import json
import os
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult
from tuner.commands import study_list
from tuner.commands.columns import align_columns
from tuner.commands.study_comparison import (
    Difference,
    differing_keys,
    sentence,
    why_not_paired,
)
from tuner.commands.study_view import lock_holder
from tuner.commands.trial_page import sparkline
from tuner.config import parsing
from tuner.dashboard.server import find_study
from tuner.errors import DataError
from tuner.manifest import TEST_RESULTS, PublishedExport
from tuner.search import storage

Tuner = Callable[..., CommandResult]


def test_ls_names_state_trials_scores_and_what_cannot_be_read(tuner: Tuner, studied: Path) -> None:
    broken = studied.parent / "broken"
    broken.mkdir()
    (broken / "space.yaml").write_text("task: [")
    listed = tuner("ls")
    assert listed.code == 0, listed.err
    header, *lines = listed.out.splitlines()
    assert header.split() == ["study", "state", "trials", "best", "metric", "test", "changed"]
    small = next(line.split() for line in lines if line.startswith("small "))
    assert small[1:3] == ["done", "2/2"] and small[4] == "accuracy"
    assert any(line.startswith("broken: ") and "space.yaml:1" in line for line in lines)
    rows = {row["study"]: row for row in map(json.loads, tuner("ls", "--json").out.splitlines())}
    manifest = json.loads((studied / "export/manifest.json").read_text())
    assert rows["small"]["test"] == manifest["scores"]["test"]["accuracy"]
    assert rows["small"]["best_trial"] == manifest["trial"] and rows["broken"]["problem"]


def test_a_study_that_cannot_be_looked_into_is_named_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("closed", "dangling", "open"):
        (tmp_path / name).mkdir()
    (tmp_path / "open" / "space.yaml").write_text("[]")
    (tmp_path / "dangling" / "space.yaml").symlink_to("nowhere")
    look = os.stat

    def refuse(path: Any, *arguments: Any, **settings: Any) -> os.stat_result:
        """As for a folder of mode 000, which root may enter."""
        if "closed/" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, *arguments, **settings)

    monkeypatch.setattr(os, "stat", refuse)
    study_list.print_studies(tmp_path, as_json=True)
    rows = {row["study"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows.keys() == {"closed", "dangling", "open"}
    assert all(row["state"] == "unreadable" and row["problem"] for row in rows.values())
    assert find_study(tmp_path, None) == tmp_path / "open"
    assert find_study(tmp_path, "closed") == tmp_path / "closed"
    with pytest.raises(DataError, match="no study"):
        find_study(tmp_path, "n" * 300)


def test_ls_of_an_empty_folder_says_how_to_make_a_study(tuner: Tuner) -> None:
    assert "no study in studies; make one with `tuner run FILE`" in tuner("ls").out


def test_trials_are_a_table_csv_and_json_with_equal_values(tuner: Tuner, studied: Path) -> None:
    as_json = [json.loads(line) for line in tuner("trials", "small", "--json").out.splitlines()]
    content = tuner("trials", "small", "--csv").out
    header = next(csv.reader(io.StringIO(content)))  # `epochs` are counted, and searched as well
    assert len(set(header)) == len(header) and {"epochs", "param.epochs"} <= set(header)
    as_csv = list(csv.DictReader(io.StringIO(content)))
    assert [row["number"] for row in as_json] == [0, 1] == [int(r["number"]) for r in as_csv]
    for row, cells in zip(as_json, as_csv, strict=True):
        assert float(cells["value"]) == row["value"] == max(row["curve"])
        assert float(cells["param.lr"]) == row["params"]["lr"]
        assert float(cells["score.accuracy"]) == row["scores"]["accuracy"]
    table = tuner("trials").out.splitlines()  # of the latest study
    assert table[0].split()[:5] == ["trial", "state", "accuracy", "epochs", "time"]
    assert [line.split()[0] for line in table[1:]] == ["#0", "#1"]
    assert sum("best" in line for line in table) == 1 and "default recipe" in table[2]
    best = tuner("trials", "small", "--best", 1).out.splitlines()
    assert len(best) == 2 and "best" in best[1]


def test_show_tells_of_a_trial_and_writes_the_file_that_repeats_it(
    tuner: Tuner, studied: Path, tmp_path: Path
) -> None:
    trial = json.loads(tuner("show", "small", 1, "--json").out)
    page = tuner("show", "small", 1).out
    assert f"validation accuracy {trial['value']:.4f}" in page and "default recipe" in page
    assert f"lr {trial['params']['lr']:.4g}" in page and "tuner export small --trial 1" in page
    file = tmp_path / "trial-1.yaml"
    file.write_text(tuner("show", "small", 1, "--yaml").out)
    space = parsing.load_space(file)
    assert not space.dimensions
    repeated = tuner("train", file, "--json")
    assert repeated.code == 0, repeated.err
    manifest = json.loads((studied / "train/manifest.json").read_text())
    assert manifest["scores"]["valid"]["accuracy"] == pytest.approx(trial["value"], abs=1e-6)


def test_compare_pairs_the_tests_of_two_studies(tuner: Tuner, studied: Path, small: Path) -> None:
    other = tuner("run", small, "search.name=other", "search.trials=1", "search.compare=default")
    assert other.code == 0, other.err
    said = tuner("compare", "small", "other")
    assert said.code == 0, said.err
    assert "paired by test example" in said.out
    first, second = map(json.loads, tuner("compare", "small", "other", "--json").out.splitlines())
    low, high = second["interval"]
    assert low <= second["difference"] <= high
    assert second["difference"] == pytest.approx(second["test"] - first["test"])


def test_bad_input_is_told_without_a_traceback(tuner: Tuner, studied: Path) -> None:
    for words, code, message in (
        (("trials", "smal"), 3, "no study 'smal' in studies; did you mean 'small'?"),
        (("show", "small", 9), 3, "study 'small' has trials 0 to 1, not 9"),
        (("show", "small", "x"), 2, "Invalid value"),
        (("compare", "small"), 2, "name at least two studies"),
        (("compare", "small", "smal"), 3, "did you mean 'small'?"),
        (("trials", "--csv", "--json"), 2, "choose one of them"),
        (("ls", "--nonsense"), 2, "No such option"),
    ):
        said = tuner(*words)
        assert (said.code, message in said.err) == (code, True), said.err
        assert "Traceback" not in said.err


def test_a_study_is_running_while_its_lock_is_held(tuner: Tuner, studied: Path) -> None:
    assert lock_holder(studied / "lock") is None and lock_holder(studied / "nothing") is None
    with storage.lock_study(studied):
        assert f"pid {os.getpid()} on host {socket.gethostname()}" in str(
            lock_holder(studied / "lock")
        )
        row = json.loads(tuner("ls", "--json").out)
        assert row["state"] == "running"


def test_a_curve_is_drawn_in_bars() -> None:
    assert sparkline([0.0, 0.5, 1.0])[0] != sparkline([0.0, 0.5, 1.0])[-1]
    assert len(set(sparkline([0.3, 0.3]))) == 1 and len(sparkline(list(range(500)))) <= 60


def test_columns_count_wide_characters() -> None:
    lines = align_columns(("a", "n"), [("猫", "1"), ("b", "10")], (1,))
    assert lines == ["a    n", "猫   1", "b   10"]


def test_a_difference_is_better_worse_or_noise_by_the_metrics_direction() -> None:
    better = Difference(0.1, (0.05, 0.15))
    assert sentence("a", "b", "accuracy", better, "maximise").endswith(": better")
    assert sentence("a", "b", "log_loss", better, "minimise").endswith(": worse")
    assert "within noise" in sentence("a", "b", "f1", Difference(0.1, (-0.1, 0.3)), "maximise")
    assert "no test score" in sentence("a", "b", "f1", None, "maximise")
    data = {"name": "folder", "path": "p", "size": 32, "seed": 0}
    assert differing_keys(data, data | {"size": 64, "folds": 5, "mean": (0.5, 0.5, 0.5)}) == []
    assert differing_keys(data, data | {"seed": 1}) == ["seed"]


def test_the_same_test_examples_in_another_place_are_paired(tmp_path: Path) -> None:
    def export(path: str, digest: str) -> PublishedExport:
        (tmp_path / TEST_RESULTS).touch()
        parts = {"task": {"name": "classification"}, "model": {"name": "resnet18_slim"}}
        run = parts | {"data": {"name": "folder", "path": path}, "recipe": {}, "seed": 0}
        manifest = {"run": run, "classes": ["a", "b"], "data_digest": digest}
        return PublishedExport(tmp_path, manifest)

    here = export("photos", "1")
    assert why_not_paired(here, export("moved", "1")) == ""
    assert why_not_paired(here, export("moved", "2")) == "the test examples differ (data.path)"


def test_the_version_is_printed_and_h_is_help(tuner: Tuner) -> None:
    assert tuner("--version").out.startswith("tuner ")
    assert "--install-completion" in tuner("-h").out and "Usage" in tuner("ls", "-h").out


def test_doctor_tells_versions_devices_disks_and_extras(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tuner("doctor")
    assert said.code == 0, said.err
    facts = json.loads(tuner("doctor", "--json").out)
    assert f"torch {facts['packages']['torch']}" in said.out and facts["cpus"] >= 1
    assert facts["used"]["workers"] >= 1 and "[timm]" in said.out
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(facts["extras"]) == project["optional-dependencies"].keys() - {"docs", "test"}
    (tmp_path / "file").write_text("")
    refused = tuner("doctor", "--studies", tmp_path / "file" / "studies")
    assert refused.code == 4 and "--studies FOLDER" in refused.err

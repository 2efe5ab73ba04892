"""`tuner report`: one file without network that says what the study says."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import create_trial
from PIL import Image
from safetensors.numpy import save_file
from sklearn.metrics import average_precision_score

from tests.conftest import CommandResult
from tuner.commands.report_charts import Curve, Point, Scale, learning_curves, score_against_cost
from tuner.commands.report_content import importance_sentences, wilson_interval
from tuner.commands.report_key_charts import (
    TrialLine,
    axes_of,
    axis_of,
    key_rows,
    parallel_plot,
    slice_plot,
)
from tuner.commands.report_probabilities import (
    TestProbabilities,
    calibration_sentence,
    confidence_bins,
    read_probabilities,
    softmax,
)
from tuner.core.types import Batch
from tuner.dashboard import plots
from tuner.files import removal
from tuner.manifest import TEST_RESULTS, PublishedExport
from tuner.tasks._classification_reports import mistakes_artifact

Tuner = Callable[..., CommandResult]
SECTIONS = (
    "How the search went",
    "What mattered",
    "Right and wrong, by class",
    "How sure it is, and how often it is right",
    "The best trials",
    "How to repeat it",
)


def test_a_run_leaves_a_report_that_says_what_came_out(tuner: Tuner, studied: Path) -> None:
    page = (studied / "report.html").read_text()
    manifest = json.loads((studied / "export/manifest.json").read_text())
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    assert "test examples, which were used for nothing else" in text
    assert f"accuracy {manifest['scores']['test']['accuracy']:.4f}" in text
    assert f"The winner is trial {manifest['trial']}" in text
    assert manifest["run_digest"] in text and "best.yaml" in text
    # learning curves, score against cost, each key, all keys, calibration, precision by recall
    names = re.findall(r'<svg [^>]*aria-label="([^"]+)"', page)
    slices = {name.removeprefix("validation accuracy by ") for name in names[2:-3]}
    assert names[:2] == [
        "validation accuracy by epoch",
        "validation accuracy against seconds of training",
    ]
    assert {"freeze_depth", "epochs"} <= slices  # in which the first two trials differ
    assert names[-3:] == [
        "all searched keys of each trial",
        "share that is right by probability",
        "precision by recall",
    ]
    assert "Learning curves" in text and "test examples its probabilities differ" in text
    assert "synthetic" in text and "resnet18_slim" in text and "Searched were" in text
    explained = json.loads((studied / "export/heat_maps.json").read_text())
    assert 0 < len(explained) <= 8 and page.count('alt="what speaks for') == len(explained)
    assert {photo["predicted"] for photo in explained} <= set(manifest["classes"])
    assert "heat_maps.json" in manifest["files"]
    # on a phone, in the dark and on paper
    assert 'name="viewport" content="width=device-width' in page
    assert "(prefers-color-scheme: dark)" in page and "@media print" in page
    # nothing is fetched: no address but those of namespaces, no script, all pictures inside
    assert "http" not in re.sub(r"<meta http-equiv", "", page) and "<script" not in page
    assert all(s.startswith("data:") for s in re.findall(r'src="([^"]+)', page))


def test_the_report_is_written_again_elsewhere_and_as_markdown(
    tuner: Tuner, studied: Path, tmp_path: Path
) -> None:
    (studied / "report.html").unlink()
    assert tuner("report").out.strip() == "studies/small/report.html"
    said = tuner("report", "small", "--markdown", "-o", "small.md")
    assert said.code == 0, said.err
    text = (tmp_path / "small.md").read_text()
    assert "## What came out" in text and "| searched key | winner | default recipe |" in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [name for name in headings if name in SECTIONS] == list(SECTIONS)
    assert "| epoch | winner | default recipe |" in text and "| key | values | trials |" in text
    assert "| class0 | " in text and "| class | average precision |" in text
    assert "tuner train studies/small/best.yaml" in text and "tuner run studies/small/space" in text
    for name in ("best.yaml", "space.yaml"):
        lines = (studied / name).read_text().splitlines()
        assert all(f"\n    {line}".rstrip() in text for line in lines)
    assert tuner("report", "small", "--markdown", "-o", "small.md").code == 0  # its own
    (tmp_path / "mine.html").write_text("<p>mine")
    refused = tuner("report", "small", "-o", "mine.html")
    assert refused.code == 4 and "no report of tuner's" in refused.err
    assert (tmp_path / "mine.html").read_text() == "<p>mine"
    missing = tuner("report", "smal")
    assert missing.code == 3 and "did you mean 'small'?" in missing.err


def test_clean_knows_the_report_by_its_first_line(studied: Path) -> None:
    report = studied / "report.html"
    assert removal.is_of_study(report)
    report.write_text("<p>mine")
    assert not removal.is_of_study(report)


def test_a_report_that_cannot_be_written_does_not_hide_the_result(
    tuner: Tuner, studied: Path, small: Path
) -> None:
    (studied / "report.html").write_text("mine")
    said = tuner("run", small, "search.trials=2")
    assert said.code == 0 and "no report was written" in said.err and "best " in said.out


def test_names_from_the_data_are_escaped(tuner: Tuner, tmp_path: Path, small: Path) -> None:
    for name in ("<b>x", "y&z"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i + len(name)).integers(0, 256, (24, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{i}.png")
    data = "data={name: folder, path: d, size: 24}"
    said = tuner("run", small, data, "search.trials=1", "recipe.epochs=1")
    assert said.code == 0, said.err
    page = (tmp_path / "studies/small/report.html").read_text()
    assert "<b>x" not in page and "&lt;b&gt;x" in page


class FixedImages:
    """A source of four images, each of one grey."""

    def take(self, index: torch.Tensor, view: int) -> Batch:
        pixels = (index.to(torch.uint8) * 60)[:, None, None, None].expand(-1, 3, 20, 30)
        return Batch(pixels, index)


def test_the_surest_mistakes_are_kept_with_their_images() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, 5.0], [3.0, 0.0]])
    truth = torch.tensor([0, 0, 0, 1])
    made = mistakes_artifact(logits, truth, ("cat", "dog"), FixedImages())  # type: ignore[arg-type]
    kept = json.loads(made["mistakes.png"])["mistakes"]
    assert [(m["truth"], m["predicted"]) for m in kept] == [
        ("cat", "dog"), ("dog", "cat"), ("cat", "dog"),
    ]  # fmt: skip
    assert kept[0]["confidence"] == pytest.approx(0.9933, abs=1e-4)
    assert plots.render_figure(made["mistakes.png"]).startswith(b"\x89PNG")
    assert mistakes_artifact(logits, logits.argmax(1), ("cat", "dog"), FixedImages()) == {}  # type: ignore[arg-type]


def test_plots_hold_every_point_inside_the_frame() -> None:
    drawn = learning_curves([Curve("a", [0.1, 0.9]), Curve("w", [0.5], "winner")], "accuracy")
    points = [Point("a", 0.0, 0.5), Point("b", 100.0, 0.7, "winner")]
    cost = score_against_cost(points, points, "accuracy")
    for svg in (drawn, cost):
        for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
            assert 0 <= float(x) <= 460 and 0 <= float(y) <= 280
    assert learning_curves([Curve("a", [])], "x") == "" == score_against_cost([], [], "x")
    assert Scale(0.0, 1.0, 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(18, 49, 0, 1, is_log=True).ticks() == [20, 30, 40]
    assert Scale(1, 100, 0, 1, is_log=True).ticks() == [1, 2, 5, 10, 20, 50, 100]


def test_a_score_is_drawn_at_its_epoch_where_not_each_has_one() -> None:
    every = Curve("each", [0.1, 0.3, 0.2, 0.4], "winner")
    some = Curve("each other", [0.3, 0.4], "default", [2, 4])
    svg = learning_curves([every, some], "accuracy")
    first, second = (re.findall(r'cx="([\d.]+)"', part) for part in svg.split('class="default"'))
    assert second == first[1::2]


def test_words_about_importances_and_intervals() -> None:
    assert "too few" in importance_sentences({}, 3)[0]
    said = importance_sentences({"lr": 0.8, "epochs": 0.15, "momentum": 0.05}, 20)
    assert said[0].startswith("lr mattered most: it explains 80%") and "momentum makes" in said[1]
    # Wilson's interval of 54 of 60, as R's prop.test(54, 60, correct = FALSE) gives it
    assert wilson_interval(0.9, 60) == pytest.approx((0.7985, 0.9534), abs=1e-4)


def test_what_keys_do_is_drawn_and_told() -> None:
    """A choice, a range, and a key that only some trials have."""
    ranges: dict[str, BaseDistribution] = {
        "optimizer": CategoricalDistribution(["sgd", "adamw"]),
        "lr": FloatDistribution(1e-5, 1e-1, log=True),
        "momentum": FloatDistribution(0.8, 1.0),
        "epochs": IntDistribution(1, 9),
    }
    tried = [("sgd", 1e-4, 0.9, 0.5), ("adamw", 1e-3, None, 0.7), ("sgd", 1e-1, 0.8, 0.6)]
    trials = []
    for optimizer, lr, momentum, value in tried:
        given = {"optimizer": optimizer, "lr": lr, "momentum": momentum, "epochs": 3}
        params = {key: choice for key, choice in given.items() if choice is not None}
        trials.append(
            create_trial(
                value=value, params=params, distributions={key: ranges[key] for key in params}
            )
        )
    axes = axes_of(trials)
    assert list(axes) == ["optimizer", "lr", "momentum"]  # all trials had the same epochs
    assert key_rows(axes, trials, 1)[:4] == [
        ("optimizer", "sgd", "2", "0.6000", "0.5500"),
        ("optimizer", "adamw", "1", "0.7000", "0.7000"),
        ("lr", "0.0001", "1", "0.5000", "0.5000"),
        ("lr", "0.001", "1", "0.7000", "0.7000"),
    ]
    assert key_rows(axes, trials, -1)[0][3:] == ("0.5000", "0.5500")  # where lower is better
    points = [Point("t", axes["lr"].place(t.params["lr"]), t.value or 0) for t in trials]
    drawn = slice_plot(axes["lr"], points, "validation accuracy")
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', drawn)]
    assert places[2] - places[1] == pytest.approx(2 * (places[1] - places[0]), abs=0.5)  # decades
    lines = [
        TrialLine("t", [axis.place_of(t.params) for axis in axes.values()], "other", 1.0)
        for t in trials
    ]
    long = axis_of("augment", [CategoricalDistribution(["none", "a mapping of many operations"])])
    beside = re.findall(r">([^<]+)</text>", parallel_plot([long, axes["lr"]], [], "all"))
    assert "a mapping…" in beside and "none" in beside
    paths = re.findall(r'<path d="([^"]*)"', parallel_plot(list(axes.values()), lines, "all"))
    assert [path.count("L") for path in paths] == [2, 1, 2]  # no line to a key that is not there


@pytest.mark.parametrize("classes", [2, 3])
def test_precision_by_recall_is_scikit_learns(classes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(classes)
    logits = (4 * rng.normal(size=(80, classes))).round() / 4  # many are equal
    truth = rng.integers(0, classes, 80)
    logits[np.arange(80), truth] += 1
    probabilities = softmax(logits)
    results = {
        "prediction": logits.astype(np.float32),
        "target": truth,
        "predicted": logits.argmax(1),
        "confidence": probabilities.max(1),
    }
    found = read_probabilities(an_export(tmp_path, "classification", classes, results))
    assert found is not None and len(found.curves) == (1 if classes == 2 else 3)
    for curve in found.curves:
        column = int(curve.name)
        expected = average_precision_score(truth == column, probabilities[:, column])
        assert curve.average_precision == pytest.approx(expected, abs=1e-6)
        assert curve.recall[-1] == 1.0 and sorted(curve.recall) == curve.recall
    scores = [curve.average_precision for curve in found.curves]
    assert scores == sorted(scores), "the hardest class first"


def test_probabilities_are_compared_with_what_is_right(tmp_path: Path) -> None:
    sure = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([True, False, True, False, True, False])
    first, last = confidence_bins(sure, right)
    assert (first.count, first.right, last.count, last.right) == (2, 0.5, 4, 0.5)
    assert last.confidence == pytest.approx(0.95)
    said = calibration_sentence(TestProbabilities([], [first, last], "examples"))
    # (2 x 0.05 + 4 x 0.45) / 6
    assert "On 6 test examples" in said and "by 32 points" in said and "too sure" in said
    labels = {
        "prediction": np.array([[9.0, -9.0], [9.0, 9.0]]),
        "target": np.array([[1.0, 0.0], [1.0, 1.0]]),
    }
    found = read_probabilities(an_export(tmp_path, "multilabel", 2, labels))
    assert found is not None and [one.right for one in found.bins] == [0.0, 1.0]
    assert [curve.average_precision for curve in found.curves] == [1.0, 1.0]
    assert read_probabilities(an_export(tmp_path, "regression", 2, labels)) is None


def an_export(folder: Path, task: str, classes: int, results: dict[str, Any]) -> PublishedExport:
    """An export with nothing but its test results; its classes are called by their numbers."""
    save_file(results, folder / TEST_RESULTS)
    manifest = {
        "files": {TEST_RESULTS: ""},
        "run": {"task": {"name": task}},
        "classes": list(map(str, range(classes))),
    }
    return PublishedExport(folder, manifest)

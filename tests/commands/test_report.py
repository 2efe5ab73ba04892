"""`tuner report`: one file without network that says what the study says."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CommandResult
from tuner.commands.report_charts import Curve, Point, Scale, learning_curves, score_against_cost
from tuner.commands.report_content import importance_sentences, wilson_interval
from tuner.core.types import Batch
from tuner.dashboard import plots
from tuner.files import removal
from tuner.tasks._classification_reports import mistakes_artifact

Tuner = Callable[..., CommandResult]


def test_a_run_leaves_a_report_that_says_what_came_out(tuner: Tuner, studied: Path) -> None:
    page = (studied / "report.html").read_text()
    manifest = json.loads((studied / "export/manifest.json").read_text())
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    assert "test examples, which were used for nothing else" in text
    assert f"accuracy {manifest['scores']['test']['accuracy']:.4f}" in text
    assert f"The winner is trial {manifest['trial']}" in text
    assert manifest["run_digest"] in text and "best.yaml" in text
    assert page.count("<svg") == 2 and "Learning curves" in text
    assert "synthetic" in text and "resnet18_slim" in text and "Searched were" in text
    explained = json.loads((studied / "export/heat_maps.json").read_text())
    assert 0 < len(explained) <= 8 and page.count('alt="what speaks for') == len(explained)
    assert {photo["predicted"] for photo in explained} <= set(manifest["classes"])
    assert "heat_maps.json" in manifest["files"]
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
    assert "tuner train studies/small/best.yaml" in text
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

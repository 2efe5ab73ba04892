"""`tuner test`: how an exported model does on data that its study never saw."""

import csv
import io
import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

import tuner
from tuner.commands import report_content
from tuner.commands.data_scan import scan_data
from tuner.commands.report import confusion_rows, contact_sheets, render_page, tables
from tuner.commands.session import home_folder
from tuner.config import plugins
from tuner.config.objective import metric_label
from tuner.config.run import Run
from tuner.core.types import Mistake
from tuner.errors import DataError, StorageError
from tuner.files.atomic import atomic_path, disk_errors
from tuner.training.inference import find_export, open_predictor
from tuner.training.new_data import NewDataTest, read_new_data, test_on

SCORES, MISTAKES, PAGE = "scores.json", "mistakes.csv", "report.html"
SHOWN_ROWS = 30  # of the wrong or the worst examples, on the page
SHOWN_SCORES = 4  # on the terminal


@dataclass(frozen=True)
class TestSettings:
    """How an export is tested: options of the command line."""

    __test__ = False  # it is no test of pytest's

    export_format: str | None = None
    device: str = "auto"
    batch_size: int = 16
    trust: bool = False
    flips: bool | None = None


@dataclass(frozen=True)
class TestedStudy:
    """An export's test with new data, for the page and the files.

    `mistakes` are the examples with a wrong class, None where the task gives none. `look` counts
    how often these data were used for a test in this folder.
    """

    __test__ = False

    study: str
    data: str
    export: Mapping[str, Any]
    names: tuple[str, ...]
    result: NewDataTest
    mistakes: list[Mistake] | None
    look: int
    digest: str

    @property
    def metric(self) -> str:
        return str(self.export["metric"])

    @property
    def manifest(self) -> Mapping[str, Any]:
        return {"scores": {"per_class": self.result.per_class}}

    @property
    def artifacts(self) -> Mapping[str, bytes]:
        return self.result.artifacts


def run_test(
    studies: Path, name: str, data: str, out: Path | None, settings: TestSettings, *, as_json: bool
) -> None:
    """Tests an export with new data, prints the scores, and writes files into a folder.

    Raises DataError where the data cannot be used or are the study's own, SpaceError, StorageError.
    """
    published = find_export(studies, name)
    run = published.run
    refuse_own_data(run, data)
    study = str(published.manifest["study"])
    if out is not None:
        read_earlier(out)
    predictor = open_predictor(
        published,
        settings.export_format,
        settings.device,
        trust=settings.trust,
        flips=settings.flips,
    )

    def warn(text: str) -> None:
        print(f"tuner: warning: {text}", file=sys.stderr)

    source, options = choose_source(run, published.manifest["classes"], data)
    new = read_new_data(run, predictor.input_spec, home_folder(warn), source, options)
    for warning in new.dataset.warnings:
        warn(warning)
    digest = new.dataset.digest
    folder = out or choose_folder(Path("tested") / study, data, digest)
    earlier = read_earlier(folder)
    metric = str(published.manifest["metric"])
    result = test_on(predictor, new, metric, settings.batch_size)
    tested = TestedStudy(
        study,
        data,
        published.manifest,
        new.names,
        result,
        predictor.task.list_mistakes(result.pairs),
        1 + (earlier["look"] if earlier.get("data_digest") == digest else 0),
        digest,
    )
    write_files(tested, folder)
    if as_json:
        typer.echo(json.dumps(scores_content(tested) | {"folder": str(folder)}))
        return
    for line in test_lines(tested, folder):
        typer.echo(line)


def refuse_own_data(run: Run, data: str) -> None:
    """Raises DataError where the new data are those of the study, or a part of them."""
    own = run.data.options.get("path")
    if own is None or not Path(str(own)).exists():
        return
    if Path(data).resolve().is_relative_to(Path(str(own)).resolve()):
        raise DataError(
            f"{data}: the study was made with these data; its score on their test part is in "
            "`tuner report`. Give data that it has not seen"
        )


def choose_source(run: Run, classes: list[str], data: str) -> tuple[str, dict[str, Any]]:
    """The data source that reads the new data, and its keys.

    The study's own source is taken with its keys where the data look like it; otherwise the first
    that reads such data for the task. Raises DataError.
    """
    readings = [r for r in scan_data(data) if r.task == run.task.name]
    own = {**run.data.options, "path": data} if "path" in run.data.options else None
    reading = next((r for r in readings if r.source == run.data.name), None)
    if own is not None and (reading is not None or not readings):
        source, options = run.data.name, {**(reading.options if reading else {}), **own}
    elif readings:
        source, options = readings[0].source, {**readings[0].options, "path": data}
    else:
        raise DataError(
            f"{data}: not known as data for {run.task.name.replace('_', ' ')}; give it in one of "
            "the forms that `tuner init` reads"
        )
    if "classes" in plugins.read_keys("data", source).fields and options.get("classes") is None:
        options["classes"] = tuple(classes)
    return source, options


def choose_folder(parent: Path, data: str, digest: str) -> Path:
    """The folder for a test with these data, named by them: `photos`, or `photos-2` where `photos`
    has the test of data in another place that differ.

    Raises StorageError.
    """
    place = Path(data).resolve()
    name = place.stem or "data"
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        earlier = read_earlier(folder)
        is_same = earlier.get("data_digest") == digest
        if not earlier or is_same or Path(str(earlier.get("data"))).resolve() == place:
            break
    return folder


def read_earlier(folder: Path) -> dict[str, Any]:
    """What an earlier test left in a folder; empty without one.

    Raises StorageError where the folder has files of these names that are not of a test.
    """
    try:
        content = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        content = {}
    except (OSError, ValueError):
        content = None
    is_own = isinstance(content, dict) and (not content or "tuner_test" in content)
    others = [n for n in (MISTAKES, PAGE) if (folder / n).exists()] if not content else []
    if not is_own or others:
        raise StorageError(
            f"{folder} has {(others or [SCORES])[0]}, which no test wrote; choose another folder "
            "with --out"
        )
    return dict(content or {})


def scores_content(tested: TestedStudy) -> dict[str, Any]:
    """What scores.json says."""
    result = tested.result
    return {
        "tuner_test": tuner.__version__,
        "study": tested.study,
        "run_digest": tested.export["run_digest"],
        "data": tested.data,
        "data_digest": tested.digest,
        "look": tested.look,
        "examples": result.count,
        "metric": tested.metric,
        "scores": result.scores,
        "intervals": result.intervals,
        "per_class": result.per_class,
    }


def example_rows(tested: TestedStudy) -> list[list[str]]:
    """The wrong examples, or the worst ones first; a header comes first. Empty: nothing is known
    of single examples.
    """
    if tested.mistakes is not None:
        return [
            ["example", "is", "predicted", "probability"],
            *(
                [tested.names[m.index], m.truth, m.predicted, f"{m.confidence:.4f}"]
                for m in tested.mistakes
            ),
        ]
    scores = tested.result.example_scores
    if scores is None:
        return []
    sign = -1 if tested.export.get("direction") == "minimise" else 1
    order = sorted(range(len(scores)), key=lambda row: sign * scores[row])
    header = ["example", metric_label(tested.metric)]
    return [header, *([tested.names[row], f"{scores[row]:.4f}"] for row in order)]


def write_files(tested: TestedStudy, folder: Path) -> None:
    """Writes scores.json, mistakes.csv and report.html. Raises StorageError."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(example_rows(tested))
    content = json.dumps(scores_content(tested), indent=2, ensure_ascii=False)
    files = {SCORES: content, MISTAKES: text.getvalue(), PAGE: format_page(tested)}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, written in files.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(written, encoding="utf-8", errors="replace")


def look_sentence(tested: TestedStudy) -> str:
    if tested.look == 1:
        return "First test with these data."
    return (
        f"Test number {tested.look} with these data: the more models are chosen by them, the more "
        "their scores flatter."
    )


def _interval(tested: TestedStudy, name: str) -> str:
    interval = tested.result.intervals.get(name)
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def ordered_scores(tested: TestedStudy) -> list[str]:
    """The names of the scores, the study's metric first."""
    names = list(tested.result.scores)
    return sorted(names, key=lambda name: (name != tested.metric, names.index(name)))


def summary_sentences(tested: TestedStudy) -> list[str]:
    """How the score compares with that of the study's test examples."""
    label, before = metric_label(tested.metric), tested.export["scores"]["test"].get(tested.metric)
    value, interval = (
        tested.result.scores[tested.metric],
        tested.result.intervals.get(tested.metric),
    )
    sentences = [
        f"On {tested.result.count:,} new examples the model has {label} {value:.4f}"
        + (f" (95 %: {_interval(tested, tested.metric)})." if interval else ".")
    ]
    if before is not None and interval is not None:
        inside = interval[0] <= before <= interval[1]
        relation = "lies within this interval" if inside else "lies outside this interval"
        sentences.append(
            f"Its score on the test examples of the study, {before:.4f}, {relation}"
            + ("." if inside else ": the new data differ from those that the study had.")
        )
    return sentences


def format_page(tested: TestedStudy) -> str:
    """report.html: it needs no network and no other file."""
    names = ordered_scores(tested)
    before = tested.export["scores"]["test"]
    rows = example_rows(tested)
    is_wrong = tested.mistakes is not None
    return render_page(
        "test_page.html",
        study=tested.study,
        data=tested.data,
        tuner_version=tuner.__version__,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        look=look_sentence(tested),
        tiles=[
            (metric_label(name), f"{tested.result.scores[name]:.4f}", _interval(tested, name))
            for name in names[:SHOWN_SCORES]
        ],
        sentences=summary_sentences(tested),
        scores=[
            (
                metric_label(name),
                f"{tested.result.scores[name]:.4f}",
                _interval(tested, name),
                f"{before[name]:.4f}" if name in before else "",
            )
            for name in names
        ],
        whose="The new examples",
        tested="new",
        confusion=confusion_rows(tested),
        class_rows=report_content.class_table(tested),
        explained=[],
        photos=(report_content.figure_values(tested, "mistakes") or {}).get("mistakes", []),
        sheets=contact_sheets(tested, "new"),
        tables=tables(tested, "new"),
        worst=rows[: SHOWN_ROWS + 1] if len(rows) > 1 else [],
        worst_heading="The wrong examples, the surest first" if is_wrong else "The worst examples",
    )


def test_lines(tested: TestedStudy, folder: Path) -> list[str]:
    """What is printed."""
    lines = [f"{tested.result.count:,} examples in {tested.data}. {look_sentence(tested)}"]
    before = tested.export["scores"]["test"]
    for name in ordered_scores(tested)[:SHOWN_SCORES]:
        interval = _interval(tested, name)
        told = f"  (95 %: {interval})" if interval else ""
        study = f"  study's test {before[name]:.4f}" if name in before else ""
        label, value = metric_label(name), tested.result.scores[name]
        lines.append(f"{label:<18} {value:.4f}{told}{study}")
    if tested.mistakes is not None:
        lines.append(f"{len(tested.mistakes)} of {tested.result.count:,} are wrong")
    lines.append(f"wrote {folder / PAGE}, {MISTAKES}, {SCORES}")
    return lines

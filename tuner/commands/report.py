"""`tuner report`: what a study asked, found and cost, as one HTML file or as Markdown."""

import base64
import contextlib
import functools
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import typer
from markupsafe import Markup
from optuna.trial import FrozenTrial

import tuner
from tuner.commands import (
    report_charts,
    report_content,
    report_key_charts,
    report_probabilities,
)
from tuner.commands.console import Console
from tuner.commands.report_charts import Curve, Point
from tuner.commands.report_content import Findings, StudyReport, gather_report
from tuner.commands.report_key_charts import Axis, TrialLine
from tuner.commands.report_markdown import format_markdown
from tuner.commands.study_view import StudyView, open_folder, open_view, trial_seconds
from tuner.commands.trial_line import format_duration, plain_value, reached_score
from tuner.errors import StorageError
from tuner.files.atomic import atomic_path
from tuner.files.removal import is_own_report

TEMPLATES = Path(__file__).parent
MAX_CURVES = 60  # of other trials; more would be a grey surface
MAX_POINTS = 300  # trials in the plots of keys
MAX_SLICES, MAX_AXES = 12, 7  # keys with a plot of their own, and in the plot of all keys
MAX_CLASS_CURVES = 20  # the hardest classes
PNG_MAGIC = b"\x89PNG"
SHOWN_ELSEWHERE = ("curve.png", "confusion.png", "mistakes.png", "per_class.csv")


def report_study(studies: Path, name: str | None, out: Path | None, *, markdown: bool) -> None:
    """Writes the report of a study and prints where it lies.

    Raises DataError, StorageError.
    """
    view = open_view(studies, name)
    typer.echo(str(write_report(view, out, markdown=markdown)))


def write_report_of(folder: Path, console: Console) -> None:
    """Writes the report of a search that ended; where that fails, the search has still ended."""
    try:
        with contextlib.closing(open_folder(folder)) as view:
            path = write_report(view, None, markdown=False)
    except Exception as error:  # whatever it is, it must not hide what the search found
        reason = (str(error).splitlines() or [""])[0]
        console.warn(f"no report was written: {reason}; `tuner report {folder.name}` tries again")
    else:
        console.emit_event("report", file=str(path))


def write_report(view: StudyView, out: Path | None, *, markdown: bool) -> Path:
    """Writes a report, by default into the study's folder; an older report is replaced.

    Raises StorageError where the file is there and no report of tuner's, or cannot be written.
    """
    path = out or view.folder / ("report.md" if markdown else "report.html")
    if path.exists() and not is_own_report(path):
        raise StorageError(f"{path} is no report of tuner's and stays; name another with --out")
    report = gather_report(view)
    text = format_markdown(report) if markdown else format_html(report)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def format_html(report: StudyReport) -> str:
    """The whole page; it needs no network and no other file."""
    header, best_rows = report_content.best_table(report)
    return render_page(
        "report.html",
        r=report,
        tuner_version=tuner.__version__,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        tiles=headline(report),
        outcome=report_content.outcome_sentences(report),
        asked=report_content.asked_sentences(report),
        winner_rows=report_content.winner_table(report),
        curves=Markup(draw_curves(report)),
        cost=Markup(draw_costs(report)),
        has_default=any(kind_of(report, trial) == "default" for trial in report.view.trials),
        importance=report_content.importance_sentences(report.importances, len(report.view.ranked)),
        slices=[Markup(plot) for plot in draw_slices(report)],
        all_keys=Markup(draw_all_keys(report)),
        sureness=sureness(report),
        whose="Validation examples in the winner's best epoch",
        tested="test",
        confusion=confusion_rows(report),
        class_rows=report_content.class_table(report),
        photos=(report_content.figure_values(report, "mistakes") or {}).get("mistakes", []),
        explained=report_content.explained_examples(report),
        sheets=contact_sheets(report, "validation"),
        tables=tables(report, "validation"),
        best_header=header,
        best_rows=best_rows,
        early=report_content.early_ends(report.view),
        commands=report_content.repeat_commands(report),
        facts=report_content.repeat_facts(report),
        files=report_content.own_files(report.view.folder),
    )


def render_page(name: str, **values: Any) -> str:
    """A page from its template."""
    return _templates().get_template(name).render(**values)


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def headline(report: StudyReport) -> list[tuple[str, str]]:
    """The few numbers at the top: label and value."""
    view, winner, manifest = report.view, report.winner, report.manifest
    numbers = []
    if report.test_score is not None:
        numbers.append((f"test {report.metric}", f"{report.test_score:.4f}"))
    comparison = (manifest or {}).get("comparison") or {}
    if "difference" in comparison:
        numbers.append(("against the default recipe", f"{comparison['difference']:+.4f}"))
    if winner is not None and (value := reached_score(winner)) is not None:
        numbers.append((f"validation {report.metric}", f"{value:.4f}"))
    seconds = sum(trial_seconds(t) or 0 for t in view.trials)
    of = f"of {view.budget} " if view.budget else ""
    numbers.append((f"{of}trials ended", str(view.budget_used)))
    numbers.append(("of training in the search", format_duration(seconds)))
    return numbers


def kind_of(report: StudyReport, trial: FrozenTrial) -> str:
    """The class of a trial in the plots."""
    if report.winner is not None and trial.number == report.winner.number:
        return "winner"
    is_default = report.default is not None and trial.number == report.default.number
    return "default" if is_default else "other"


def draw_curves(report: StudyReport) -> str:
    order = {"other": 0, "default": 1, "winner": 2}
    curves = []
    for trial in report.view.trials:
        scores = dict(sorted(trial.intermediate_values.items()))
        label, kind = f"trial {trial.number}", kind_of(report, trial)
        curves.append(Curve(label, list(scores.values()), kind, list(scores)))
    others = [curve for curve in curves if curve.kind == "other"][-MAX_CURVES:]
    shown = others + [curve for curve in curves if curve.kind != "other"]
    shown.sort(key=lambda curve: order[curve.kind])
    return report_charts.learning_curves(shown, f"validation {report.metric}")


def draw_costs(report: StudyReport) -> str:
    def point(trial: FrozenTrial) -> Point:
        seconds, value = trial_seconds(trial) or 0.0, float(trial.value or 0)
        label = f"trial {trial.number}: {value:.4f} in {format_duration(seconds)}"
        return Point(label, seconds, value, kind_of(report, trial))

    points = [point(t) for t in report.view.ranked if trial_seconds(t) is not None]
    points.sort(key=lambda p: p.kind != "other")
    front = [point(t) for t in report_content.pareto_front(report.view)]
    return report_charts.score_against_cost(points, front, f"validation {report.metric}")


def key_axes(report: StudyReport) -> list[Axis]:
    """The axes of the searched keys, those that mattered most first."""
    axes = report_key_charts.axes_of(report.view.ranked)
    keys = dict.fromkeys([*(key for key in report.importances if key in axes), *axes])
    return [axes[key] for key in keys]


def plotted_trials(report: StudyReport) -> list[FrozenTrial]:
    """Completed trials, at most about MAX_POINTS of all ranks; winner and default come last."""
    ranked = report.view.ranked
    step = -(-len(ranked) // MAX_POINTS)
    shown = [t for i, t in enumerate(ranked) if step and i % step == 0]
    shown += [t for t in ranked if kind_of(report, t) != "other" and t not in shown]
    return sorted(shown, key=lambda t: ("other", "default", "winner").index(kind_of(report, t)))


def draw_slices(report: StudyReport) -> list[str]:
    """A plot for each key that mattered most: the scores over its values."""
    trials = plotted_trials(report)
    plots = []
    for axis in key_axes(report)[:MAX_SLICES]:
        points = [
            Point(
                f"trial {t.number}: {plain_value(t.params[axis.key])}, {t.value:.4f}",
                axis.place(t.params[axis.key]),
                float(t.value or 0),
                kind_of(report, t),
            )
            for t in trials
            if axis.key in t.params
        ]
        plots.append(report_key_charts.slice_plot(axis, points, f"validation {report.metric}"))
    return plots


def draw_all_keys(report: StudyReport) -> str:
    """The plot of all keys at once; empty where fewer than two were searched."""
    axes, trials = key_axes(report)[:MAX_AXES], plotted_trials(report)
    if len(axes) < 2:
        return ""
    ranks = {trial.number: rank for rank, trial in enumerate(reversed(report.view.ranked))}
    scores = [float(t.value or 0) for t in trials]
    lines = [
        TrialLine(
            f"trial {t.number}: {score:.4f}",
            [*(axis.place_of(t.params) for axis in axes), score],
            kind_of(report, t),
            ranks[t.number] / max(1, len(ranks) - 1),
        )
        for t, score in zip(trials, scores, strict=True)
    ]
    last = Axis(report.metric, min(scores), max(scores))
    return report_key_charts.parallel_plot([*axes, last], lines, "all searched keys of each trial")


def sureness(report: StudyReport) -> dict[str, Any] | None:
    """Precision by recall, and how often answers are right for how sure they are."""
    found = report.probabilities
    if found is None:
        return None
    bins, classes = found.bins, found.curves[:MAX_CLASS_CURVES]
    right, sure = [one.right for one in bins], [one.confidence for one in bins]
    curves = [
        Curve(
            f"{one.name}: average precision {one.average_precision:.3f}",
            one.precision,
            "other" if rank or len(classes) == 1 else "default",
            one.recall,
        )
        for rank, one in enumerate(classes)
    ]
    calibration = Curve(f"by the {found.answers}' probabilities", right, "winner", sure)
    plot = report_charts.unit_plot
    return {
        "sentences": report_probabilities.sentences(found),
        "calibration": Markup(
            plot([calibration], "probability", "share that is right", diagonal=True)
        ),
        "recall": Markup(plot(curves[::-1], "recall", "precision", diagonal=False))
        if curves
        else "",
        "several": len(curves) > 1,
        "bins": report_probabilities.bin_rows(found),
        "precision": report_probabilities.precision_rows(found, report_content.MAX_TABLE_ROWS),
    }


def confusion_rows(report: Findings) -> dict[str, Any] | None:
    """The confusion matrix with the share of the true class in each cell."""
    values = report_content.figure_values(report, "confusion")
    if values is None or len(values["classes"]) > report_content.MAX_TABLE_ROWS:
        return None
    rows = [
        (name, [(count, count / max(1, sum(counts))) for count in counts])
        for name, counts in zip(values["classes"], values["matrix"], strict=True)
    ]
    return {"classes": values["classes"], "rows": rows}


def contact_sheets(report: Findings, examples: str) -> list[tuple[str, str]]:
    """The pictures that a task drew of some examples, as base64 with a heading."""
    return [
        (_heading(name, examples), base64.b64encode(content).decode())
        for name, content in report.artifacts.items()
        if content.startswith(PNG_MAGIC)
    ]


def tables(report: Findings, examples: str) -> list[tuple[str, list[list[str]]]]:
    """The tables of some examples that the page does not show otherwise."""
    shown = SHOWN_ELSEWHERE if report_content.class_table(report) else SHOWN_ELSEWHERE[:-1]
    names = [n for n in report.artifacts if n.endswith(".csv") and n not in shown]
    read = [(_heading(name, examples), report_content.csv_table(report, name)) for name in names]
    return [(heading, table) for heading, table in read if len(table) > 1]


def _heading(name: str, examples: str) -> str:
    """`per_class.csv` as `Per class, on validation examples`."""
    words = Path(name).stem.replace("_", " ")
    return f"{words[:1].upper()}{words[1:]}, on {examples} examples"

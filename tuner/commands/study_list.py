"""`tuner ls`: the studies of a folder, a line each."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from tuner.commands.columns import align_columns
from tuner.commands.study_view import StudyView, open_folder
from tuner.config.objective import metric_label
from tuner.dashboard.server import changed_at, study_folders
from tuner.errors import TunerError

HEADER = ("study", "state", "trials", "best", "metric", "test", "changed")


def print_studies(studies: Path, *, as_json: bool) -> None:
    """Prints the studies of a folder, the one that changed last first.

    A study that cannot be read is named with the reason; it does not hide the others.
    """
    rows = [describe_study(folder) for folder in study_folders(studies)]
    rows.sort(key=lambda row: row["changed"] or "", reverse=True)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    if not rows:
        typer.echo(f"no study in {studies}; make one with `tuner run FILE`")
        return
    for line in align_columns(HEADER, [list(map(str, _cells(row))) for row in rows], (2, 3, 5)):
        typer.echo(line)
    for row in rows:
        if row["problem"]:
            typer.echo(f"{row['study']}: {row['problem']}")


def describe_study(folder: Path) -> dict[str, Any]:
    """One study as --json prints it; `problem` says why it cannot be read, or is None."""
    changed = changed_at(folder)
    row: dict[str, Any] = {
        "study": folder.name,
        "state": "unreadable",
        "trials": None,
        "budget": None,
        "best": None,
        "best_trial": None,
        "metric": None,
        "test": None,
        "changed": _minute(datetime.fromtimestamp(changed)) if changed else None,
        "folder": str(folder),
        "problem": None,
    }
    try:
        return row | _readable_values(open_folder(folder))
    except TunerError as error:
        return row | {"problem": error.problems[0]}


def _readable_values(view: StudyView) -> dict[str, Any]:
    best = view.ranked[0] if view.ranked else None
    values: dict[str, Any] = {
        "state": view.state,
        "trials": view.budget_used,
        "budget": view.budget,
        "best": best.value if best else None,
        "best_trial": best.number if best else None,
        "metric": view.metric,
    }
    if changed := _last_end(view):
        values["changed"] = changed
    try:
        manifest = view.published.manifest if view.published else None
    except TunerError as error:
        return values | {"problem": error.problems[0]}
    return values | {"test": manifest["scores"]["test"].get(view.metric) if manifest else None}


def _last_end(view: StudyView) -> str | None:
    """When the latest trial ended or began, in local time; None: there is none."""
    times = [t for trial in view.trials for t in (trial.datetime_start, trial.datetime_complete)]
    known = [t for t in times if t is not None]
    return _minute(max(known)) if known else None


def _minute(moment: datetime) -> str:
    return moment.isoformat(sep=" ", timespec="minutes")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def score(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    counts = "" if row["trials"] is None else f"{row['trials']}/{row['budget'] or '-'}"
    label = metric_label(row["metric"]) if row["metric"] else ""
    best, test = score(row["best"]), score(row["test"])
    return (row["study"], row["state"], counts, best, label, test, row["changed"] or "")

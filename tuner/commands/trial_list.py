"""`tuner trials`: the trials of a study as a table, as CSV or as JSON."""

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

import typer
from optuna.trial import FrozenTrial

from tuner.commands.columns import align_columns
from tuner.commands.study_view import StudyView, trial_seconds
from tuner.commands.trial_line import format_duration, format_value, reached_score
from tuner.config.objective import metric_label
from tuner.search.history import (
    BEST_EPOCH,
    DUPLICATE_OF,
    IS_DEFAULT_RECIPE,
    REASON,
    SCORES,
    TAKEN_FROM,
)


def print_trials(view: StudyView, best: int | None, form: str) -> None:
    """Prints all trials by number, or the `best` completed ones, the best first.

    `form` is text, csv or json.
    """
    trials = view.trials if best is None else view.ranked[:best]
    if form == "json":
        for trial in trials:
            typer.echo(json.dumps(trial_values(trial)))
    elif form == "csv":
        typer.echo(trials_csv(trials), nl=False)
    elif not trials:
        ended = "no trial completed" if view.trials else "no trial yet"
        typer.echo(f"study {view.name!r}: {ended}")
    else:
        for line in trial_lines(view, trials):
            typer.echo(line)


def trial_values(trial: FrozenTrial) -> dict[str, Any]:
    """One trial as --json prints it."""
    attributes = trial.user_attrs
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": reached_score(trial),
        "best_epoch": attributes.get(BEST_EPOCH),
        "epochs": max(trial.intermediate_values, default=0),
        "seconds": trial_seconds(trial),
        "default": bool(attributes.get(IS_DEFAULT_RECIPE)),
        "same_as": attributes.get(DUPLICATE_OF),
        "from": attributes.get(TAKEN_FROM),
        "reason": attributes.get(REASON),
        "params": trial.params,
        "scores": attributes.get(SCORES, {}),
        "curve": [score for _, score in sorted(trial.intermediate_values.items())],
    }


def trials_csv(trials: Iterable[FrozenTrial]) -> str:
    """The trials as CSV: `param.KEY` for each searched key, and `score.NAME` for each score."""
    rows = [trial_values(trial) for trial in trials]
    params = list(dict.fromkeys(key for row in rows for key in row["params"]))
    scores = list(dict.fromkeys(key for row in rows for key in row["scores"]))
    plain = ["number", "state", "value", "best_epoch", "epochs", "seconds", "default"]
    plain += ["same_as", "from", "reason"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = [*(f"param.{key}" for key in params), *(f"score.{name}" for name in scores)]
    writer.writerow([*plain, *header])
    for row in rows:
        writer.writerow(
            [
                *(row[key] for key in plain),
                *(row["params"].get(key) for key in params),
                *(row["scores"].get(name) for name in scores),
            ]
        )
    return text.getvalue()


def trial_lines(view: StudyView, trials: list[FrozenTrial]) -> list[str]:
    """The table that a person reads."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    header = ["trial", "state", metric_label(view.metric), "epochs", "time", *keys, "note"]
    best = view.ranked[0].number if view.ranked else None
    rows = []
    for trial in trials:
        row, seconds = trial_values(trial), trial_seconds(trial)
        rows.append(
            [
                f"#{trial.number}",
                row["state"],
                "" if row["value"] is None else f"{row['value']:.4f}",
                f"{row['best_epoch'] or '-'}/{row['epochs']}",
                "" if seconds is None else format_duration(seconds),
                *(format_value(trial.params[k]) if k in trial.params else "" for k in keys),
                describe_role(trial, best),
            ]
        )
    return align_columns(header, rows, (2, 3, 4))


def describe_role(trial: FrozenTrial, best: int | None) -> str:
    """What is special about a trial: the best, the default recipe, a repetition, a failure."""
    attributes = trial.user_attrs
    notes = []
    if trial.number == best:
        notes.append("best")
    if attributes.get(IS_DEFAULT_RECIPE):
        notes.append("default recipe")
    if TAKEN_FROM in attributes:
        notes.append(f"from {attributes[TAKEN_FROM]}")
    if DUPLICATE_OF in attributes:
        notes.append(f"same as #{attributes[DUPLICATE_OF]}")
    if attributes.get(REASON):
        notes.append(str(attributes[REASON]).splitlines()[0])
    return ", ".join(notes)

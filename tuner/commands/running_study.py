"""`tuner status`, `tuner stop` and `tuner enqueue`: a study that another process runs."""

import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import typer
from optuna.trial import TrialState

from tuner.commands.export import load_study_space
from tuner.commands.study_view import LOCK_HOLDER, StudyView, open_folder, trial_seconds
from tuner.commands.trial_line import format_duration, plain_value
from tuner.config.given_params import checked_params
from tuner.config.objective import metric_label
from tuner.config.space import Space
from tuner.config.yaml_document import parse_override_value
from tuner.errors import SpaceError, StorageError
from tuner.files.enqueued_files import list_enqueued, write_enqueued

POLL_SECONDS = 0.2
SECOND_SIGNAL_SECONDS = 0.3  # after the first one, which asks for an orderly stop


# -- status


def print_status(view: StudyView, *, as_json: bool) -> None:
    """Prints how far a study is and who runs it."""
    values = status_values(view)
    if as_json:
        typer.echo(json.dumps(values))
        return
    for line in status_lines(view, values):
        typer.echo(line)


def status_values(view: StudyView) -> dict[str, Any]:
    """The state of a study as --json prints it; times are in seconds."""
    states = Counter(t.state.name.lower() for t in view.trials)
    best = view.ranked[0] if view.ranked else None
    running = [
        {
            "number": t.number,
            "epochs": max(t.intermediate_values, default=0),
            "score": t.intermediate_values.get(max(t.intermediate_values, default=0)),
            "params": t.params,
        }
        for t in view.trials
        if t.state == TrialState.RUNNING
    ]
    return {
        "study": view.name,
        "state": view.state,
        "coordinators": list(view.coordinators),
        "trials": view.budget_used,
        "budget": view.budget,
        "states": dict(states),
        "best": best.value if best else None,
        "best_trial": best.number if best else None,
        "metric": view.metric,
        "running": running if view.coordinators else [],
        "enqueued": len(list_enqueued(view.folder)),
        "seconds_left": seconds_left(view, max(1, len(running))),
    }


def seconds_left(view: StudyView, workers: int) -> float | None:
    """About how long the remaining trials take, by the mean of those that ended; None: unknown."""
    seconds = [s for t in view.trials if (s := trial_seconds(t)) is not None]
    left = view.budget - view.budget_used
    if not view.coordinators or not seconds or left <= 0:
        return None
    return statistics.fmean(seconds) * left / workers


def status_lines(view: StudyView, values: dict[str, Any]) -> list[str]:
    """What a person reads."""
    who = f" by {', '.join(view.coordinators)}" if view.coordinators else ""
    others = [f"{n} {state}" for state, n in values["states"].items() if state != "complete"]
    of = f" of {values['budget']}" if values["budget"] else ""
    ended = f"{values['trials']}{of} ended"
    lines = [
        f"study    {view.name}: {view.state}{who}",
        f"trials   {', '.join([ended, *others])}",
    ]
    if values["best"] is not None:
        label = metric_label(view.metric)
        lines.append(f"best     #{values['best_trial']}, validation {label} {values['best']:.4f}")
    for trial in values["running"]:
        score = "" if trial["score"] is None else f", {trial['score']:.4f}"
        params = "  ".join(f"{k} {plain_value(v)}" for k, v in trial["params"].items())
        lines.append(f"running  #{trial['number']}, {trial['epochs']} epochs{score}  {params}")
    if values["enqueued"]:
        lines.append(f"enqueued {values['enqueued']} of your own, tried next")
    if values["seconds_left"] is not None:
        lines.append(f"left     about {format_duration(values['seconds_left'])} for the trials")
    if view.state == "stopped":
        file = shlex.quote(str(view.folder / "space.yaml"))
        lines.append(f"continue with the same `tuner run`, or with `tuner run {file}`")
    return lines


# -- stop


def stop_study(view: StudyView, *, now: bool) -> None:
    """Asks the processes that run a study to stop, and waits until they have.

    Raises StorageError where one of them is on another machine or of another user.
    """
    if not view.coordinators:
        typer.echo(f"study {view.name!r} is not running")
        return
    elsewhere = [c for c in view.coordinators if not _ask_to_stop(c, now=now)]
    when = "now" if now else "after the running epoch"
    for coordinator in view.coordinators:
        if coordinator not in elsewhere:
            typer.echo(
                f"asked {coordinator} to stop {when}; waiting (Ctrl-C ends only the waiting)"
            )
    while set(coordinators_now(view.folder)) - set(elsewhere):
        time.sleep(POLL_SECONDS)
    if elsewhere:
        raise StorageError(
            f"study {view.name!r} is also run by {', '.join(elsewhere)}; run `tuner stop` there, "
            "or end it with Ctrl-C where a program of yours has called tuner.run"
        )
    typer.echo(f"study {view.name!r} has stopped; the same `tuner run` continues it")


def coordinators_now(folder: Path) -> tuple[str, ...]:
    """The processes that run a study at this moment, in words."""
    with contextlib.closing(open_folder(folder)) as view:
        return view.coordinators


def _ask_to_stop(coordinator: str, *, now: bool) -> bool:
    """Sends SIGINT, as Ctrl-C does. False: the process cannot be reached from here."""
    match = LOCK_HOLDER.match(coordinator)
    if match is None or match["host"] != socket.gethostname():
        return False
    pid = int(match["pid"])
    if not _may_be_tuner(pid):
        return False
    try:
        os.kill(pid, signal.SIGINT)
        if now:
            time.sleep(SECOND_SIGNAL_SECONDS)
            os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        return True  # it has just ended
    except PermissionError:
        return False
    return True


def _may_be_tuner(pid: int) -> bool:
    """Whether a process here may be tuner's. In another container of this host's name the number
    may mean another process, which must get no signal. Without /proc nothing is known against it.
    """
    line = Path(f"/proc/{pid}/cmdline")
    if not line.exists():
        return True
    words = line.read_bytes().decode(errors="replace").split("\0")
    return any(Path(word).name == "tuner" for word in words)


# -- enqueue


def enqueue_trial(view: StudyView, settings: list[str]) -> None:
    """Has a search try these parameters next; what is left out has the default recipe's value.

    Raises SpaceError where a key is not searched or a value lies outside its range.
    """
    space = load_study_space(view.folder)
    params = chosen_params(space, settings)
    write_enqueued(view.folder, params)
    typer.echo(f"enqueued: {'  '.join(f'{k} {plain_value(v)}' for k, v in params.items())}")
    if view.coordinators:
        typer.echo("it is tried as soon as a worker is free")
    elif view.budget_used >= view.budget > 0:
        file = shlex.quote(str(view.folder / "space.yaml"))
        more = view.budget_used + 1
        typer.echo(f"the budget is spent; try it with `tuner run {file} search.trials={more}`")
    else:
        typer.echo("it is tried first when `tuner run` continues the study")


def chosen_params(space: Space, settings: list[str]) -> dict[str, Any]:
    """The parameters of a trial as name -> value, checked. Raises SpaceError."""
    given = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise SpaceError(f"{text!r}: expected KEY=VALUE, such as lr=0.001")
        try:
            given[key] = parse_override_value(value)
        except SpaceError as error:
            raise SpaceError(*(f"{key}: {problem}" for problem in error.problems)) from None
    return checked_params(space, given)

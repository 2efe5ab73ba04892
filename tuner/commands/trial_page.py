"""`tuner show`: everything about one trial, and the file that repeats it."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
from optuna.trial import FrozenTrial

from tuner.commands.export import load_study_space
from tuner.commands.exported_run import choose_outputs
from tuner.commands.study_view import StudyView, trial_seconds
from tuner.commands.trial_line import format_duration, plain_value
from tuner.commands.trial_list import describe_role, trial_values
from tuner.commands.winner import best_yaml_content
from tuner.config.objective import metric_label
from tuner.config.space import dump_yaml
from tuner.search import history
from tuner.search.history import ATTEMPT, BEST_EPOCH, SCORES

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
MAX_BARS = 60  # of a sparkline; a longer curve is thinned


def print_trial(view: StudyView, number: int, *, as_json: bool, as_yaml: bool) -> None:
    """Prints one trial as lines, as a JSON object, or as a file for `tuner train`."""
    trial = view.trial(number)
    if as_yaml:
        typer.echo(repeatable_yaml(view, trial), nl=False)
    elif as_json:
        typer.echo(json.dumps({"study": view.name, **trial_values(trial)}))
    else:
        for line in trial_page(view, trial):
            typer.echo(line)


def repeatable_yaml(view: StudyView, trial: FrozenTrial) -> str:
    """The run that a trial carried out, as a file for `tuner train`. Raises SpaceError."""
    space = load_study_space(view.folder)
    run = history.run_of_trial(space, view.study, trial)
    comment = f"# trial {trial.number} of study {view.name!r}; `tuner train` repeats it\n"
    outputs = choose_outputs(space.settings.search, trial, retrain=False)
    return comment + dump_yaml(best_yaml_content(run, space, outputs))


def trial_page(view: StudyView, trial: FrozenTrial) -> Iterator[str]:
    """What a person reads of one trial."""
    best = view.ranked[0].number if view.ranked else None
    role = describe_role(trial, best)
    state = trial.state.name.lower()
    yield f"trial {trial.number} of study {view.name}: {state}{f' ({role})' if role else ''}"
    curve = [score for _, score in sorted(trial.intermediate_values.items())]
    yield f"score       {describe_score(view, trial)}"
    if curve:
        bars = sparkline(curve)
        last = max(trial.intermediate_values)  # with validate_every not each epoch has a score
        yield f"curve       {bars}  {curve[0]:.4f} to {curve[-1]:.4f} in {last} epochs"
    scores = trial.user_attrs.get(SCORES, {})
    if scores:
        listed = ", ".join(f"{metric_label(name)} {value:.4f}" for name, value in scores.items())
        yield f"scores      {listed}"
    yield "parameters"
    for key, value in trial.params.items():
        yield f"            {key} {plain_value(value)}"
    if not trial.params:
        yield "            none were searched"
    yield f"time        {describe_time(trial)}"
    if trial.user_attrs.get(ATTEMPT, 1) > 1:
        yield f"attempt     {trial.user_attrs[ATTEMPT]}, after earlier ones that were lost"
    yield from how_to_repeat(view.folder, trial)


def describe_score(view: StudyView, trial: FrozenTrial) -> str:
    """The score with its epoch, and the place among the completed trials."""
    row = trial_values(trial)
    if row["value"] is None:
        return "none"
    numbers = [t.number for t in view.ranked]
    place = (
        f"; place {numbers.index(trial.number) + 1} of {len(numbers)}"
        if trial.number in numbers
        else ""
    )
    when = f" in epoch {row['best_epoch']} of {row['epochs']}" if row["best_epoch"] else ""
    return f"validation {metric_label(view.metric)} {row['value']:.4f}{when}{place}"


def describe_time(trial: FrozenTrial) -> str:
    seconds = trial_seconds(trial)
    started = f"{trial.datetime_start:%Y-%m-%d %H:%M}" if trial.datetime_start else "?"
    if seconds is None:
        return f"still running, since {started}"
    return f"{format_duration(seconds)}, from {started}"


def how_to_repeat(folder: Path, trial: FrozenTrial) -> Iterator[str]:
    """The commands that train the trial again."""
    at_home = folder.parent == Path("studies")
    studies = "" if at_home else f" --studies {shlex.quote(str(folder.parent))}"
    name, file = shlex.quote(folder.name), f"trial-{trial.number}.yaml"
    yield "repeat      with the same seed, on the training examples:"
    yield f"            tuner show {name} {trial.number} --yaml{studies} > {file}"
    yield f"            tuner train {file}"
    if BEST_EPOCH in trial.user_attrs:
        yield "export      retrained on training and validation examples:"
        yield f"            tuner export {name} --trial {trial.number}{studies}"


def sparkline(values: Sequence[float]) -> str:
    """The course of some values as a row of bars, the lowest value the lowest bar."""
    bars = BARS if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII_BARS
    step = max(1, -(-len(values) // MAX_BARS))
    shown = values[::step]
    low, high = min(shown), max(shown)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in shown)

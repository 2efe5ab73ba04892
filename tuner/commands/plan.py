"""`tuner plan`: how long a search will take, and what it needs, from a few measured steps."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
import typer

from tuner.commands.finishing_times import FinishingTimes
from tuner.commands.plan_notes import PlanNotes
from tuner.commands.run import worker_count
from tuner.commands.session import Folders, Session, open_session
from tuner.commands.trial_line import format_duration
from tuner.config.run import Run, parse_duration
from tuner.config.search_settings import AS_MANY_AS_FIT
from tuner.config.space import Space
from tuner.errors import count_words
from tuner.jobs import AS_MANY_AS_POSSIBLE
from tuner.messages import DatasetReport, ModelSurvey, ProfileJob, TrainingProfile
from tuner.search.history import params_key
from tuner.search.study_cost import StudyCost, draw_runs, estimate_study

BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Plan:
    """What a search will take. `profiles` are by the model's name, `epochs` is a usual number."""

    space: Space
    trials: int
    cost: StudyCost
    profiles: Mapping[str, TrainingProfile]
    epochs: int
    workers: int
    parameter_count: int


def print_plan(
    space: Space, folders: Folders, console: Any, began: float, *, as_json: bool
) -> None:
    """Measures some steps at each freeze depth, and prints what follows. Trains nothing to keep.

    A search begins as this does: what it takes to load the libraries, to start a worker and to read
    the data is taken from here. `began`: when the command began, by `time.monotonic()`.

    Raises SpaceError, DataError, StorageError.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with open_session(space, folders, console) as session:
        survey, facts = session.survey_models(), session.inspect_data()
        plan = make_plan(session, survey, facts, time.monotonic() - began)
        PlanNotes(folders.home, space, survey, facts).write(plan.profiles)
    if as_json:
        typer.echo(json.dumps(plan_values(plan)))
        return
    for line in plan_lines(plan):
        typer.echo(line)


def make_plan(
    session: Session, survey: ModelSurvey, facts: DatasetReport, seconds_to_begin: float
) -> Plan:
    """Has a worker measure, and estimates the study, whose command begins in so many seconds."""
    space = session.space
    runs = draw_runs(space)
    first_runs = first_runs_of(space, runs)
    profiles = measure(session, survey, [*runs, *first_runs])
    workers = worker_count(space, survey.gpu_count)
    workers = 1 if workers == AS_MANY_AS_POSSIBLE else workers
    folds = first_runs[-1].folds
    names = survey.max_depths

    def seconds_of(run: Run) -> float:
        depth = run.recipe.depth_of(names[run.model.name])
        last = min(run.recipe.epochs, run.recipe.stop_epoch or run.recipe.epochs)
        return folds * profiles[run.model.name].seconds_of_training(depth, last)

    begin = seconds_to_begin + max(p.begin_seconds for p in profiles.values())
    finishing = FinishingTimes(session.folders.home, space, survey, facts).read(begin)
    trials = number_of_trials(space, runs, seconds_of, begin + finishing, workers)
    cost = estimate_study(space, runs, first_runs, trials, seconds_of, workers)
    beside = begin + finishing + seconds_to_fill(runs, trials, profiles, names)
    cost = StudyCost(cost.middle + beside, cost.low + beside, cost.high + beside)
    epochs = sorted(run.recipe.epochs for run in runs)[len(runs) // 2]
    return Plan(space, trials, cost, profiles, epochs, workers, facts.parameter_count)


def first_runs_of(space: Space, runs: Sequence[Run]) -> list[Run]:
    """The runs with which a study begins: the linear-probe trial, where there is one, and the
    default recipe.
    """
    default = space.make_run(space.default_choices())
    if space.settings.search.sampler == "grid" or len({r.recipe.frozen for r in runs}) < 2:
        return [default]
    deepest = max(runs, key=lambda run: run.recipe.frozen).recipe
    frozen = {"freeze_depth": deepest.freeze_depth, "freeze": deepest.freeze}
    fewest = min(run.recipe.epochs for run in runs)
    recipe = default.recipe.model_copy(update={**frozen, "epochs": fewest})
    return [replace(default, recipe=recipe), default]


def measure(
    session: Session, survey: ModelSurvey, runs: Sequence[Run]
) -> dict[str, TrainingProfile]:
    """The profile of each model, at the depths that the runs have."""
    by_model = {run.model.name: run for run in runs}
    depths = {run.recipe.depth_of(survey.max_depths[run.model.name]) for run in runs}
    job = ProfileJob(
        session.make_assignment(runs[-1]), tuple(by_model.values()), tuple(sorted(depths))
    )
    profiles = session.run_job("tuner.training.profiling:profile_training", job)
    return dict(zip(by_model, profiles, strict=True))


def number_of_trials(
    space: Space, runs: Sequence[Run], seconds_of: Any, beside: float, workers: int
) -> int:
    """The trials of the file, or those that fit its time."""
    search = space.settings.search
    if not space.dimensions:
        return 1
    most = min(search.trials, AS_MANY_AS_FIT)
    if search.sampler == "grid":
        points = [space.default_params(), *space.grid_params()]
        most = min(most, len(set(map(params_key, points))))
    if search.time is None:
        return most
    mean = sum(map(seconds_of, runs)) / len(runs)
    after = (search.retrain + (search.compare == "default")) * mean
    fit = workers * (parse_duration(search.time) - beside - after) / max(mean, 1e-3)
    return max(1, min(most, int(fit)))


def seconds_to_fill(
    runs: Sequence[Run],
    trials: int,
    profiles: Mapping[str, TrainingProfile],
    max_depths: Mapping[str, int],
) -> float:
    """Of computing, once, the activations of each depth that a study is likely to reach."""
    counts: dict[tuple[str, int], int] = {}
    for run in runs:
        key = run.model.name, run.recipe.depth_of(max_depths[run.model.name])
        counts[key] = counts.get(key, 0) + 1
    return sum(
        (1 - (1 - count / len(runs)) ** trials) * profiles[model].seconds_to_fill(depth)
        for (model, depth), count in counts.items()
    )


def cached_bytes(profile: TrainingProfile) -> float:
    """The bytes of the activations of all depths that are cached."""
    examples = profile.split_sizes["train"] + profile.split_sizes["valid"]
    return sum(cost.cached_bytes * examples for cost in profile.depths)


def disk_bytes(plan: Plan) -> float:
    """About what a study adds to the disk: activations, weights of trials, exports."""
    search = plan.space.settings.search
    copies = search.keep + 2 * plan.workers + len(plan.space.settings.export) + 1
    weights = copies * BYTES_PER_PARAMETER * plan.parameter_count
    return weights + sum(map(cached_bytes, plan.profiles.values()))


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as --json prints it; times in seconds, sizes in bytes."""
    return {
        "trials": plan.trials,
        "seconds": plan.cost.middle,
        "seconds_low": plan.cost.low,
        "seconds_high": plan.cost.high,
        "workers": plan.workers,
        "peak_bytes": max(p.peak_bytes for p in plan.profiles.values()),
        "disk_bytes": disk_bytes(plan),
        "models": {name: asdict(profile) for name, profile in plan.profiles.items()},
    }


def plan_lines(plan: Plan) -> list[str]:
    """What a person reads."""
    low, middle, high = (
        format_duration(s) for s in (plan.cost.low, plan.cost.middle, plan.cost.high)
    )
    lines = [
        f"study   about {middle} ({low} to {high}) for {plan.trials} trials on "
        f"{plan.workers} worker{'s' if plan.workers > 1 else ''}, with retraining, test and export",
        "        without what the pruner saves",
    ]
    for name, profile in plan.profiles.items():
        lines += [
            f"model   {name}",
            f"depth   {count_words(plan.epochs, 'epoch', 'epochs'):<12}  an epoch  cache",
        ]
        lines += [depth_line(profile, cost.depth, plan.epochs) for cost in profile.depths]
        lines += batch_lines(profile)
    peak = max(p.peak_bytes for p in plan.profiles.values())
    lines.append(f"memory  {peak / 1e9:.1f} GB a worker, measured")
    lines.append(f"disk    about {disk_bytes(plan) / 1e6:.0f} MB: activations, weights, exports")
    return lines


def batch_lines(profile: TrainingProfile) -> list[str]:
    """The largest batch, where there is a GPU."""
    if profile.largest_batch is None:
        return []
    whole = profile.largest_batch >= profile.split_sizes["train"]
    what = "all training examples" if whole else f"{profile.largest_batch} examples"
    return [
        f"batch   up to {what} at once at freeze depth {profile.depths[0].depth}; larger ones are "
        "trained in parts, their gradients added up"
    ]


def depth_line(profile: TrainingProfile, depth: int, epochs: int) -> str:
    """One freeze depth: a trial, an epoch, and what the cache saves."""
    cost = profile.cost_at(depth)
    trial = format_duration(profile.seconds_of_training(depth, epochs))
    epoch = profile.seconds_of_training(depth, 1) - profile.setup_seconds
    cache = "computed in each epoch" if depth else "nothing is frozen"
    if cost.is_cached:
        examples = profile.split_sizes["train"] + profile.split_sizes["valid"]
        saved, size = profile.seconds_to_fill(depth), cost.cached_bytes * examples / 1e6
        cache = f"{size:.1f} MB, saves {saved:.1f}s in each epoch but the first"
    return f"{depth:>5}   {trial:<12}  {epoch:>7.1f}s  {cache}"

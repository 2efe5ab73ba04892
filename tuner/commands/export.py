"""`tuner export`: the model of a study's winner, or of another trial, in the chosen formats."""

import contextlib
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from tuner import manifest
from tuner.commands.console import Console
from tuner.commands.exported_run import choose_export
from tuner.commands.session import INSTEAD, Folders, home_folder, open_session
from tuner.commands.soup import (
    is_current,
    manifest_of_run,
    plan_soup,
    remove_soup_checkpoints,
    soup_candidates,
)
from tuner.commands.study_view import StudyView, open_view
from tuner.config import parsing, plugins, yaml_document
from tuner.config.objective import metric_label
from tuner.config.space import Space
from tuner.dashboard.server import find_study
from tuner.errors import DataError, SpaceError, count_words, suggest_names
from tuner.files import checkpoint_files, removal
from tuner.manifest import PublishedExport
from tuner.search import history, storage
from tuner.search.confirmation import read_confirmed
from tuner.search.history import DUPLICATE_OF, REASON
from tuner.search.pruners import PRUNERS
from tuner.search.winner_choice import choose_unconfirmed

COSTS_BY = ("milliseconds", "megabytes", "parameters")
MAX_SCORES_SHOWN = 4  # of the test examples; the model card has all


def export_trial(
    studies: Path, name: str, formats: tuple[str, ...], trial: int | None, console: Console
) -> PublishedExport:
    """Exports into the study's folder `export`, or `export-N` for trial N.

    Formats that are exported already are kept.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = find_study(studies, name)
    space = load_study_space(folder)
    known = plugins.list_names("export")
    for wanted in formats:
        if ":" not in wanted and wanted not in known:
            raise SpaceError(f"--format {wanted!r} is not known{suggest_names(wanted, known)}")
    place = folder / ("export" if trial is None else f"export-{trial}")
    removal.require_target(place, INSTEAD)
    with storage.lock_study(folder), contextlib.ExitStack() as stack:
        s = stack.enter_context(
            open_session(space, Folders(studies, home_folder(console.warn)), console)
        )
        database = storage.open_storage(space.settings.storage, folder, console.warn)
        stack.callback(storage.close_storage, database)
        study = optuna.load_study(
            study_name=folder.name,
            storage=database,
            sampler=optuna.samplers.RandomSampler(),
            pruner=PRUNERS["none"](1),
        )
        chosen = _choose_trial(study, space, trial)
        left = checkpoint_files.find_best_weights(
            folder
            / checkpoint_files.CHECKPOINTS_FOLDER
            / str(history.proposal_numbers(study)[chosen.number])
        )
        run, weights, outputs = choose_export(
            study,
            chosen,
            history.run_of_trial(space, study, chosen),
            left,
            space.settings.search,
            retrain=trial is not None or space.settings.search.retrain,
        )
        candidates = soup_candidates(space, study, folder, chosen) if trial is None else None
        manifest.recover_export(place)
        before = manifest.read_export(place)
        earlier = manifest_of_run(before, run, outputs)
        kept: tuple[str, ...] = ()
        if earlier is not None and is_current(earlier.get("soup"), candidates):
            kept = tuple(earlier["exports"])
        if kept and set(formats) <= set(kept) and before is not None:
            return before
        soup = plan_soup(s, folder, candidates, earlier)
        is_soup = soup is not None and soup.ingredients
        published: PublishedExport = s.finalize(
            run,
            place,
            (*kept, *(formats or space.settings.export)),
            chosen.number,
            soup.valid_scores
            if soup is not None and is_soup
            else chosen.user_attrs[history.SCORES],
            weights,
            soup=soup,
            outputs=outputs,
        )
        remove_soup_checkpoints(folder)
        return published


def find_wanted_trial(
    studies: Path,
    name: str,
    trial: int | None,
    within: str | None,
    by: str | None,
    console: Console,
) -> int | None:
    """The trial that --trial, or --within and --by, name; None: the winner.

    Raises SpaceError where they do not go together, and what `choose_cheapest` raises.
    """
    if within is None:
        if by is not None:
            raise SpaceError(f"--by {by} chooses among the trials of --within, such as --within 1%")
        return trial
    if trial is not None:
        raise SpaceError("--trial and --within: choose one of them")
    return choose_cheapest(studies, name, parse_share(within), by or COSTS_BY[0], console)


def choose_cheapest(
    studies: Path, name: str, within: float, by: str, console: Console
) -> int | None:
    """The trial with the cheapest model among those whose validation score is nearly the best.

    Args:
        studies: The folder of the studies.
        name: The study.
        within: How much worse than the best its score may be, as a share of the best.
        by: milliseconds, megabytes or parameters.
        console: Hears what was measured.

    Returns:
        The trial's number; None: it is the winner, whose export is the study's own.

    Raises:
        DataError: No trial completed.
        SpaceError: `by` is unknown.
    """
    if by not in COSTS_BY:
        raise SpaceError(f"--by {by!r} is not known{suggest_names(by, COSTS_BY)}")
    view = open_view(studies, name)
    with contextlib.closing(view):
        trials = nearly_best(view, within)
        space = load_study_space(view.folder)
        runs = [history.run_of_trial(space, view.study, trial) for trial in trials]
        winner = _choose_trial(view.study, space, None).number
    with open_session(space, Folders(studies, home_folder(console.warn)), console) as s:
        costs: list[dict[str, float]] = s.run_job(
            "tuner.training.model_costs:measure_model_costs",
            tuple(s.make_assignment(run) for run in runs),
        )
    number, cost = min(
        zip((t.number for t in trials), costs, strict=True), key=lambda pair: pair[1][by]
    )
    models = {run.model.name for run in runs}
    console.note(
        f"{count_words(len(trials), 'trial', 'trials')} with "
        f"{count_words(len(models), 'model', 'models')} within {100 * within:g} % of the best "
        f"score; #{number} has the least {by}: {cost[by]:,.6g} (one process, median of 10 calls "
        "with one example, torch on this CPU)"
    )
    return None if number == winner else number


def nearly_best(view: StudyView, within: float) -> list[FrozenTrial]:
    """The completed trials whose score is at most `within`, a share, worse than the best, the best
    first. Raises DataError without any.
    """
    if not view.ranked:
        raise DataError(f"study {view.name!r}: no trial completed")
    sign = history.sign_of(view.study.direction)
    best = float(view.ranked[0].value or 0)
    least = sign * best - within * abs(best)
    return [t for t in view.ranked if sign * float(t.value or 0) >= least]


def parse_share(text: str) -> float:
    """`1%` or `0.01` as 0.01. Raises SpaceError."""
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise SpaceError(f"--within {text!r}: write a share such as 1% or 0.01")
    return share


def load_study_space(folder: Path) -> Space:
    """The space of the study in `folder`.

    Its space.yaml has the study's name; one that an earlier version wrote may have none, and then
    the folder has it.
    """
    document = yaml_document.read_document(folder / "space.yaml")
    space = parsing.parse_space(document, of_study=True)
    if space.settings.search.name is not None:
        return space
    return parsing.with_values(space.document, {("search", "name"): folder.resolve().name})


def _choose_trial(study: optuna.Study, space: Space, number: int | None) -> FrozenTrial:
    """The winner, or the trial of this number.

    Raises DataError where that trial has no epoch that could be exported.
    """
    if number is None:
        confirmed = read_confirmed(study, space)
        return confirmed.winner.trial if confirmed else choose_unconfirmed(study, space).winner
    trials = study.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        known = f"trials 0 to {len(trials) - 1}" if trials else "no trial yet"
        raise DataError(f"study {study.study_name!r} has {known}, not {number}")
    chosen = trials[number]
    if DUPLICATE_OF in chosen.user_attrs:
        return trials[int(chosen.user_attrs[DUPLICATE_OF])]
    if history.BEST_EPOCH not in chosen.user_attrs:
        raise DataError(
            f"trial {number} ended {chosen.state.name.lower()} without an epoch "
            f"({chosen.user_attrs.get(REASON, 'no reason given')}); choose another"
        )
    return chosen


def show_published(console: Console, published: PublishedExport) -> None:
    scores = published.manifest["scores"]["test"]
    console.emit_event("published", folder=str(published.folder), test=scores)
    metric = published.manifest["metric"]
    shown = [metric, *(name for name in scores if name != metric)][:MAX_SCORES_SHOWN]
    console.print_line(
        "test    " + "  ".join(f"{metric_label(name)} {scores[name]:.4f}" for name in shown)
    )
    for kind, e in published.manifest["exports"].items():
        console.print_line(
            f"export  {published.folder / e['file']}  {kind}, {manifest.describe_check(e)}"
        )
    for kind, reason in published.manifest.get("left_out", {}).items():
        console.warn(f"{kind} was not published: {reason}")

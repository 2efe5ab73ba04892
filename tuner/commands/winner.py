"""The winner of a study: chosen, written to best.yaml, retrained, tested and exported."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from tuner import manifest
from tuner.commands.ended_search import EndedSearch
from tuner.commands.exported_run import (
    choose_export,
    choose_outputs,
    is_retrained,
    weights_of,
)
from tuner.commands.progress import Progress
from tuner.commands.session import interrupted_error, study_name, write_yaml
from tuner.commands.soup import (
    is_current,
    manifest_of_run,
    plan_soup,
    remove_soup_checkpoints,
    soup_candidates,
)
from tuner.commands.summary import Summary
from tuner.commands.trial_line import format_duration
from tuner.config.objective import metric_label
from tuner.config.run import Run
from tuner.config.search_settings import AS_MANY_AS_FIT
from tuner.config.space import Space
from tuner.dashboard.artifacts import write_result_note
from tuner.errors import NoUsableTrial
from tuner.files.checkpoint_files import CHECKPOINTS_FOLDER
from tuner.files.tested_run_files import find_tested_run, keep_tested_run
from tuner.manifest import PublishedExport, is_export_of
from tuner.messages import DefaultComparison, OutputSettings
from tuner.search import history, storage
from tuner.search.confirmation import (
    Confirmation,
    Confirmed,
    any_repeat_kept,
    read_confirmed,
    settings_for,
)
from tuner.search.coordinator import Coordinator
from tuner.search.samplers import derive_seed
from tuner.search.time_left import TimeLeft
from tuner.search.winner_choice import WinnerChoice, choose_unconfirmed

BOOTSTRAP = -1  # in a seed where a training has the number of its proposal


def progress_of(coordinator: Coordinator, time_left: TimeLeft | None = None) -> Progress:
    """The coordinator's counts at this moment."""
    used, budget = coordinator.budget_used, coordinator.proposer.trial_budget()
    seconds = None
    if time_left is not None and used < budget < AS_MANY_AS_FIT:
        seconds = time_left.estimate(budget - used, budget)
    is_whole = coordinator.proposer.tries_everything
    return Progress(used, budget, frozenset(coordinator.running), seconds, is_whole)


def best_yaml_content(run: Run, space: Space, outputs: OutputSettings) -> dict[str, Any]:
    """best.yaml: the same form as a space file, with nothing left to choose."""
    settings = space.settings
    search = {
        "name": study_name(space),
        "metric": settings.search.metric,
        "direction": settings.search.direction,
        "calibrate": outputs.calibrate,
        "test_flips": outputs.test_flips,
    }
    return run.to_dict() | {
        "search": search,
        "engine": settings.engine.model_dump(),
        "export": list(settings.export),
    }


def finalize_once(ended: EndedSearch) -> Summary:
    """Lets one of several coordinators confirm the best trials and make the export of the winner.

    The others report which coordinator does it, once it has claimed the winner.
    """
    session, coordinator, folder = ended.session, ended.coordinator, ended.folder
    if not coordinator.coordination.is_shared:
        return finalize_best(ended)
    choice = choose_unconfirmed(coordinator.study, session.space)
    winner, tied = choice.winner, choice.tied_numbers
    busy = (
        [
            other
            for other in coordinator.coordination.other_coordinators()
            if other.winner_state is None
        ]
        if coordinator.is_past_timeout()
        else []
    )
    other = busy[0] if busy else coordinator.coordination.claim_winner(winner.number)
    if other is not None:
        trial_run = history.run_of_trial(session.space, coordinator.study, winner)
        export = choose_export(
            coordinator.study, winner, trial_run, None, session.settings.search, retrain=True
        )
        summary = unpublished_summary(ended, winner, tied, export.run)
        return replace(summary, anything_new=True, made_elsewhere=other)
    with storage.lock_study(folder):  # `tuner export` writes here too
        summary = finalize_best(ended)
    coordinator.coordination.mark_winner_made()
    return summary


def finalize_best(ended: EndedSearch) -> Summary:
    """Confirms the best trials, and makes the export of the winner. Raises TunerError."""
    session, coordinator, folder = ended.session, ended.coordinator, ended.folder
    choice = choose_unconfirmed(coordinator.study, session.space)
    confirmed = confirm_best(ended)
    if confirmed is not None:
        choice = WinnerChoice(confirmed.winner.trial, [])
    winner = choice.winner
    trial_run = history.run_of_trial(session.space, coordinator.study, winner)
    run, _, outputs = choose_export(
        coordinator.study, winner, trial_run, None, session.settings.search, retrain=True
    )
    write_yaml(
        folder / "best.yaml",
        best_yaml_content(run, session.space, outputs),
        f"trial {winner.number} of study {study_name(session.space)!r}; "
        f"{describe_confirmed(confirmed)}`tuner train` repeats it",
    )
    summary = replace(
        unpublished_summary(ended, winner, choice.tied_numbers, run),
        confirmed=confirmed,
        beaten=choice.beaten,
        noise=choice.noise,
    )
    return export_winner(ended, trial_run, summary)


def unpublished_summary(
    ended: EndedSearch, winner: FrozenTrial, tied: list[int], run: Run
) -> Summary:
    """What there is to say of a winner before its export is made.

    `tied` are the numbers of the trials that are as good; `run` is the winner's retraining.
    """
    search = ended.session.settings.search
    return Summary(
        folder=ended.folder,
        metric=str(search.metric),
        direction=search.direction or "maximise",
        progress=progress_of(ended.coordinator),
        winner=winner,
        tied_numbers=tied,
        run=run,
        published=None,
        anything_new=ended.new_trials,
        default_trial=history.default_trial(ended.coordinator.study),
    )


def export_winner(ended: EndedSearch, trial_run: Run, summary: Summary) -> Summary:
    """Retrains, tests and exports the winner, unless its export is there. Raises TunerError.

    `trial_run` is the run that the winner's trial carried out. Returns the summary with what is
    published.
    """
    session, coordinator, folder = ended.session, ended.coordinator, ended.folder
    winner, settings = summary.winner, session.settings
    manifest.recover_export(folder / "export")
    published = manifest.read_export(folder / "export")
    again = choose_outputs(settings.search, winner, retrain=True)
    is_made = manifest_of_run(published, summary.run, again) is not None
    retrains = is_retrained(ended, winner, is_made=is_made)
    kept = weights_of(ended, winner)
    run, weights, outputs = choose_export(
        coordinator.study, winner, trial_run, kept, settings.search, retrain=retrains
    )
    confirmation = summary.confirmed.to_dict(summary.metric) if summary.confirmed else None
    candidates = soup_candidates(session.space, coordinator.study, folder, winner)
    if (
        published is not None
        and not is_stale(published, run, outputs, settings.export, confirmation)
        and is_current(published.manifest.get("soup"), candidates)
    ):
        # what a command that was killed after it published had still to do
        remove_soup_checkpoints(folder)
        note_result(coordinator.study, winner, published)
        return replace(summary, published=published)
    if weights is None and not settings.search.retrain:
        session.console.note(
            "nothing is exported: search.retrain is false, and no weights of trial "
            f"{winner.number} are kept (search.keep)"
        )
        return summary
    earlier = manifest_of_run(published, run, outputs)
    soup = plan_soup(session, folder, candidates, earlier)
    averaged = manifest.averaged_runs(soup.findings if soup is not None else None)
    is_tested = earlier is not None and manifest.averaged_runs(earlier.get("soup")) == averaged
    comparison = None
    if not is_tested:
        comparison = compare_with_default(ended, winner, is_soup=bool(averaged), retrains=retrains)
    if settings.search.retrain and not retrains:
        session.console.note(
            f"search.time leaves no time to train trial {winner.number} again, so the export has "
            "the weights that the trial left; the same command with more time trains it again"
        )
    if weights is None and not averaged:
        ended.trained(ended.retraining_seconds(winner))
    published = session.finalize(
        run,
        folder / "export",
        settings.export,
        winner.number,
        soup.valid_scores if soup is not None and averaged else winner.user_attrs[history.SCORES],
        weights,
        comparison,
        confirmation,
        soup,
        outputs,
    )
    remove_soup_checkpoints(folder)
    ended.clock.exported = True
    note_result(coordinator.study, winner, published)
    return replace(summary, published=published, anything_new=True)


def note_result(study: optuna.Study, winner: FrozenTrial, published: PublishedExport) -> None:
    """Writes into the study's note, for the dashboard, what the winner has over the default."""
    if compared := manifest.describe_comparison(published.manifest):
        write_result_note(study, f"trial {winner.number}: {compared}")


def confirm_best(ended: EndedSearch) -> Confirmed | None:
    """Trains the best trials again, as search.confirm says; None: it says that none is.

    Repeats that an earlier command made are not made again. Raises Interrupted, and what a worker
    refuses.
    """
    session, study = ended.session, ended.coordinator.study
    search, console = session.settings.search, session.console
    settings = settings_for(search, len(history.ended_proposals(study)))
    if settings is None or is_of_earlier_version(ended):
        return None

    def tell(number: int, repeat: int, score: float | None, reason: str) -> None:
        which = f"#{number} again, {repeat + 1} of {settings.repeats}"
        if score is None:
            console.warn(f"{which}: no score ({reason}); it cannot win")
        else:
            console.note(f"{which}: {metric_label(str(search.metric))} {score:.4f}")

    confirmation = Confirmation(
        study,
        session.space,
        settings,
        ended.split_sizes,
        session.make_assignment,
        (ended.folder / CHECKPOINTS_FOLDER).absolute(),
        tell,
        session.stopping,
    )
    seconds = confirmation.estimate_seconds(ended.workers)
    if confirmation.count and not ended.has_time_for(seconds + winner_seconds(ended)):
        console.warn("search.time leaves no time to confirm the best trials; the best one wins")
        return None
    if confirmation.count:
        ended.trained(seconds)
        console.note(
            f"confirming {', '.join(f'#{n}' for n in confirmation.trial_numbers)}: "
            f"{confirmation.count} trainings with other seeds and other validation examples, "
            f"about {format_duration(seconds)}"
        )
        session.run_jobs(
            confirmation.next_job,
            confirmation.report,
            confirmation.on_job_end,
            session.go_on,
            ended.workers,
        )
        if session.stop_signal:
            raise interrupted_error(session.stop_signal)
        if confirmation.error is not None:
            raise confirmation.error
    confirmed = read_confirmed(study, session.space)
    if confirmed is None:
        console.warn("no trial could be repeated, so the best one wins unconfirmed")
    return confirmed


def winner_seconds(ended: EndedSearch) -> float:
    """About how long the training of the winner takes."""
    if not ended.session.settings.search.retrain:
        return 0.0
    winner = choose_unconfirmed(ended.coordinator.study, ended.session.space).winner
    return ended.retraining_seconds(winner)


def is_of_earlier_version(ended: EndedSearch) -> bool:
    """Whether the study was finished by a version that confirmed nothing, and stays finished.

    A file that says `search.confirm` itself, or new trials, open it again.
    """
    published = manifest.read_export(ended.folder / "export")
    return (
        published is not None
        and "confirmation" not in published.manifest
        and not ended.new_trials
        and ended.session.settings.search.confirm == "auto"
        and not any_repeat_kept(ended.coordinator.study)
    )


def describe_confirmed(confirmed: Confirmed | None) -> str:
    """The part of best.yaml's first line about the repeats."""
    if confirmed is None:
        return ""
    winner = confirmed.winner
    spread = "" if winner.deviation is None else f" +- {winner.deviation:.4f}"
    return f"confirmed at {winner.mean:.4f}{spread} in {len(winner.scores)} repeats; "


def compare_with_default(
    ended: EndedSearch, winner: FrozenTrial, *, is_soup: bool, retrains: bool
) -> DefaultComparison | None:
    """The default recipe's test, with which the winner's is compared; None: there is none.

    It is made once and kept in the study's folder. Where the default recipe has won, it is compared
    with a soup of it and other trials alone. It is trained again where the winner is.
    """
    session, coordinator, folder = ended.session, ended.coordinator, ended.folder
    default = history.default_trial(coordinator.study)
    if session.settings.search.compare == "none" or default is None:
        return None
    seed = derive_seed(session.settings.search.seed, BOOTSTRAP)
    if default.number == winner.number and not is_soup:
        return DefaultComparison(default.number, None, seed)
    run, weights, outputs = choose_export(
        coordinator.study,
        default,
        history.run_of_trial(session.space, coordinator.study, default),
        weights_of(ended, default),
        session.settings.search,
        retrain=retrains,
    )
    wanted = {
        "run_digest": run.digest(),
        "temperature": None if outputs.calibrate == "none" else outputs.calibrate,
        "test_flips": outputs.test_flips,
    }
    tested = find_tested_run(folder, wanted, folder / "export" / manifest.TEST_RESULTS)
    if tested is None and weights is None:
        seconds = ended.retraining_seconds(default) + ended.retraining_seconds(winner)
        if not ended.has_time_for(seconds):
            session.console.warn(
                "not compared with the default recipe: search.time leaves no time to train it"
            )
            return None
        ended.trained(ended.retraining_seconds(default))
    if tested is None:
        kept = (folder / CHECKPOINTS_FOLDER / "default").absolute()
        try:
            tested = session.run_default_test(run, kept, weights, outputs)
        except NoUsableTrial as error:
            session.console.warn(f"not compared with the default recipe, since its {error}")
            return None
    keep_tested_run(folder, tested)
    return DefaultComparison(default.number, tested, seed)


def is_stale(
    published: PublishedExport,
    run: Run,
    outputs: OutputSettings,
    formats: tuple[str, ...],
    confirmation: Mapping[str, Any] | None,
) -> bool:
    """Whether an export is of another run or has other outputs, lacks a format, or does not say how
    its trial was confirmed.
    """
    m = published.manifest
    return (
        not is_export_of(m, run, outputs)
        or not set(formats) <= {*m["exports"], *m.get("left_out", {})}
        or (confirmation is not None and m.get("confirmation") != confirmation)
    )

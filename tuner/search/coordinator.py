"""The coordinator: the one owner of a study.

It asks Optuna for trials, hands out their runs as jobs, receives epochs, prunes, and records how
trials ended.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from tuner.config.run import Run, parse_duration
from tuner.config.search_settings import AS_MANY_AS_FIT
from tuner.config.space import Space
from tuner.errors import TunerError
from tuner.files.checkpoint_files import CheckpointRetention
from tuner.files.crash_points import crash_point
from tuner.files.enqueued_files import list_enqueued, read_enqueued
from tuner.files.removal import remove_file
from tuner.jobs import Job, Outcome, stall_of
from tuner.messages import Assignment, Epoch, micro_batch_count
from tuner.search import history
from tuner.search.duplicate_trials import DuplicateTrials
from tuner.search.history import ATTEMPT, IS_DEFAULT_RECIPE, KILLED, PROPOSAL, REFUSED, params_key
from tuner.search.leases import SharedCoordination, SingleCoordinator
from tuner.search.ledger import Ledger
from tuner.search.proposals import TrialProposer
from tuner.search.running_trial import RunningTrial, SearchListener
from tuner.search.samplers import derive_seed
from tuner.search.stop_rules import DUPLICATES_IN_A_ROW, reason_to_stop
from tuner.search.time_limit import TimeLimit
from tuner.search.trial_outcomes import TrialOutcomes
from tuner.search.windowed_study import WindowedStudy

POLL_SECONDS = 1.0  # how often to look whether other coordinators left something to do


class Coordinator:
    """The owner of a study. Everything is decided from the study's history.

    An engine calls `next_job`, `report` and `on_job_end`.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        make_assignment: Callable[[Run], Assignment],
        listener: SearchListener,
        should_stop: Callable[[], bool],
        coordination: SingleCoordinator | SharedCoordination | None = None,
        retention: CheckpointRetention | None = None,
        enqueued_folder: Path | None = None,
        time_limit: TimeLimit | None = None,
    ) -> None:
        self.study = WindowedStudy(study)
        self.enqueued_folder = enqueued_folder
        self.time_limit = time_limit
        self.end_reason: str | None = None  # why the search ends before its budget is spent
        self.duplicates_in_a_row = 0
        self.space = space
        self.make_assignment = make_assignment
        self.listener = listener
        self.should_stop = should_stop
        self.search_settings = space.settings.search
        self.proposer = TrialProposer(self.study, space)
        history.keep_budget(study, self.proposer.trial_budget())
        self.coordination = coordination or SingleCoordinator()
        self.ledger = Ledger(self.study, self.proposer, self.coordination)
        self.running: dict[int, RunningTrial] = {}
        self.since = time.monotonic()
        self.started_count = 0  # how many trials this process has begun
        # when there was no job last, where other coordinators may change that
        self.last_empty_poll = float("-inf")
        self.coordination.run_exclusively(lambda: self.ledger.read_history(set()))
        self.retention = retention or CheckpointRetention(None, 0)
        self.retention.take_over(history.own_proposals(self.study))
        self.duplicates = DuplicateTrials(self.study, self.ledger, listener)
        self.outcomes = TrialOutcomes(
            self.study,
            self.search_settings,
            self.ledger,
            self.duplicates,
            self.retention,
            listener,
            should_stop,
        )
        self._read_trials()

    @property
    def budget_used(self) -> int:
        """The number of trials that count against the budget."""
        return self.ledger.budget_used

    @property
    def fatal_error(self) -> TunerError | None:
        """The error for which no further trial is begun, or None."""
        return self.outcomes.error

    def running_numbers(self) -> set[int]:
        """Return the numbers of this coordinator's running trials.

        They are the trials that workers carry out, the duplicates that wait, and the suspects.
        """
        return {*self.running, *self.duplicates.numbers(), *self.outcomes.suspected()}

    # -- what an engine calls

    def next_job(self) -> Job | None:
        """Return the next trial as a job.

        Returns:
            None when the budget is handed out, the time is up or the search is stopping.
        """
        job = self._next_job()
        if job is None and not self.running:
            self.outcomes.end_suspicion()
        return job

    def _next_job(self) -> Job | None:
        while self.should_ask():
            trial = self.coordination.run_exclusively(self.propose_trial)
            if trial is None:
                self.last_empty_poll = (
                    time.monotonic() if self.coordination.is_shared else self.last_empty_poll
                )
                return None
            crash_point("search.asked")
            try:
                running = self.start_trial(trial)
            except UpdateFinishedTrialError:  # another process ended it
                self.study.forget_running(trial.number)
                continue
            if running is not None:
                return self.job(running)
        return None

    def job(self, running: RunningTrial) -> Job:
        checkpoints = self.retention.folder_of(running.proposal)
        assignment = replace(
            self.make_assignment(running.run),
            checkpoint_folder=checkpoints,
            keep_best_weights=self.search_settings.keep > 0,
            micro_batches=micro_batch_count(
                running.attempt, running.killed, self.search_settings.retries
            ),
        )
        return Job(
            running.number,
            "tuner.training.worker_jobs:run_trial",
            assignment,
            (checkpoints,) if checkpoints else (),
            stall=stall_of(self.space.settings.engine, paced=True),
        )

    def should_ask(self) -> bool:
        """Return whether to look for a trial.

        Not when the search is stopped, when the time is up, or right after there was none.
        """
        if self.should_stop() or self.fatal_error is not None:
            return False
        if self.coordination.is_shared and time.monotonic() - self.last_empty_poll < POLL_SECONDS:
            return False
        return not self.is_past_timeout() and not self._has_reason_to_stop()

    def propose_trial(self) -> Trial | None:
        """Start a trial of the study, if the budget allows one more."""
        if self.coordination.is_shared:
            self.ledger.read_history(self.running_numbers())
        if not self.has_budget_left():
            return None
        self._take_up_enqueued()
        return self.proposer.propose_trial(self.ledger.proposal_count)

    def _take_up_enqueued(self) -> None:
        """Enqueue what a person wants to be tried next, once the first trials have begun, those of
        the file's own guesses among them: each of these has a proposal of its own.

        Where the search was killed between the two steps, the same parameters are not enqueued
        again.
        """
        first_trials = self.proposer.first_count
        if self.enqueued_folder is None or self.ledger.proposal_count < first_trials:
            return
        for path in list_enqueued(self.enqueued_folder):
            params = read_enqueued(path)
            if params is not None:
                self.study.enqueue_trial(params, skip_if_exists=True)
            remove_file(path)

    def has_budget_left(self) -> bool:
        running_count = self.ledger.running_elsewhere + len(self.running_numbers())
        return self.budget_used + running_count < self.proposer.trial_budget()

    def is_past_timeout(self) -> bool:
        """Return whether no trial begins any more, by `search.timeout` or `search.time`."""
        timeout = self.search_settings.timeout
        is_late = timeout is not None and time.monotonic() - self.since > parse_duration(timeout)
        return is_late or self.is_out_of_time()

    def is_out_of_time(self) -> bool:
        """Return whether `search.time` leaves no time for a further trial."""
        return self.time_limit is not None and not self.time_limit.has_time_for_trial()

    def must_end_now(self) -> bool:
        """Return whether running epochs are not waited for, because the command would be late."""
        return self.time_limit is not None and self.time_limit.must_end_now()

    def _has_reason_to_stop(self) -> bool:
        self.end_reason = reason_to_stop(self.study, self.search_settings)
        has_open_budget = self.search_settings.trials == AS_MANY_AS_FIT
        if has_open_budget and self.duplicates_in_a_row >= DUPLICATES_IN_A_ROW:
            self.end_reason = f"the last {DUPLICATES_IN_A_ROW} trials repeated earlier ones"
        return self.end_reason is not None

    def _read_trials(self) -> None:
        if self.time_limit is not None:
            self.time_limit.read_trials(self.study, self.space)

    def waits_for_others(self) -> bool:
        """Return whether others run trials that this coordinator would retry if they died."""
        return self.ledger.running_elsewhere > 0 and not self.is_past_timeout()

    def start_trial(self, trial: Trial) -> RunningTrial | None:
        """Ask for the trial's parameters and note it as running.

        Returns:
            None if the trial is a duplicate, which gets the result of another trial.
        """
        attrs = trial.user_attrs
        proposal = int(attrs.get(PROPOSAL, self.ledger.proposal_count))
        if PROPOSAL not in attrs:
            self.ledger.proposal_count += 1
        with self.study.window():
            run = self.space.sample(trial, seed=derive_seed(self.search_settings.seed, proposal))
        self.study.flush_writes(trial, now=True)
        crash_point("search.drawn")
        originals = [*self.running.values(), *self.outcomes.suspected().values()]
        if self.duplicates.takes(trial, run, proposal, originals):
            self.duplicates_in_a_row += 1
            return None
        self.duplicates_in_a_row = 0
        self.started_count += 1
        running = self.running[trial.number] = RunningTrial(
            trial,
            run,
            proposal,
            int(attrs.get(ATTEMPT, 1)),
            params_key(trial.params),
            self.started_count,
            is_default=bool(attrs.get(IS_DEFAULT_RECIPE)),
            killed=int(attrs.get(KILLED, 0)),
            refused=bool(attrs.get(REFUSED)),
        )
        self.listener.on_trial_start(running)
        return running

    def report(self, job: Job, epoch: Epoch) -> bool:
        """Record an epoch and ask the pruner. It hears of validated epochs alone.

        Returns:
            Whether the trial goes on.
        """
        running = self.running[job.number]
        score = epoch.scores.get(str(self.search_settings.metric))
        try:
            if score is not None:
                running.trial.report(score, epoch.number)
            self.listener.on_epoch(running, epoch)
            self.study.flush_writes(running.trial)
            crash_point("search.reported")
            # After its last epoch a trial has used all its time. Pruned, it would lose its result.
            may_prune = not running.is_default and epoch.number < running.epochs
            running.is_pruned = (
                score is not None and may_prune and self.study.should_prune(running.trial)
            )
        except UpdateFinishedTrialError:
            return False  # another process ended it
        self.outcomes.accepted(running)
        self._count_epoch(running, epoch, score)
        return not (running.is_pruned or running.is_out_of_time or self.should_stop())

    def _count_epoch(self, running: RunningTrial, epoch: Epoch, score: float | None) -> None:
        """Note what a trial costs, and whether the time ends it before its next epoch."""
        running.trained_seconds += epoch.seconds
        running.epoch_seconds = max(running.epoch_seconds, epoch.seconds)
        running.is_scored = running.is_scored or score is not None
        if self.time_limit is not None and epoch.number < running.epochs and not running.is_pruned:
            epochs_left = running.epochs - epoch.number
            running.is_out_of_time = not self.time_limit.has_time_for_epoch(running, epochs_left)

    def on_job_end(self, job: Job, outcome: Outcome) -> None:
        """Record how a trial ended, once."""
        self.last_empty_poll = float("-inf")
        self.outcomes.record(self.running.pop(job.number), outcome, self.started_count)
        self._read_trials()

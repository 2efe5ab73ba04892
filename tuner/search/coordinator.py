"""The coordinator: the one owner of a study. It asks Optuna, hands out runs, hears epochs, prunes, and crowns the winner."""

import time
from collections.abc import Callable
from dataclasses import replace

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from tuner.config.run import Run, parse_duration
from tuner.config.space import Space
from tuner.errors import TunerError
from tuner.files.checkpoint_files import CheckpointRetention
from tuner.files.crash_points import crash_point
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
from tuner.search.trial_outcomes import TrialOutcomes
from tuner.search.windowed_study import WindowedStudy

POLL_SECONDS = 1.0  # seconds between looks at whether other coordinators left something to do


class Coordinator:
    """`next_job`, `report` and `ended` are what an engine calls; everything is decided from the study's history."""

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        make_assignment: Callable[[Run], Assignment],
        listener: SearchListener,
        should_stop: Callable[[], bool],
        coordination: SingleCoordinator | SharedCoordination | None = None,
        retention: CheckpointRetention | None = None,
    ) -> None:
        self.study = WindowedStudy(study)
        self.space, self.make_assignment, self.listener, self.should_stop = (
            space,
            make_assignment,
            listener,
            should_stop,
        )
        self.search_settings, self.proposer = (
            space.settings.search,
            TrialProposer(self.study, space),
        )
        self.coordination = coordination or SingleCoordinator()
        self.ledger = Ledger(self.study, self.proposer, self.coordination)
        self.running: dict[int, RunningTrial] = {}
        self.since, self.started_at = time.monotonic(), 0  # when, and how many trials
        # when there was nothing to hand out, where others may change that
        self.last_empty_poll = float("-inf")
        self.coordination.run_exclusively(lambda: self.ledger.read_history(set()))
        self.retention = retention or CheckpointRetention(None, 0)
        self.retention.take_over(history.ended_proposals(self.study))
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

    @property
    def budget_used(self) -> int:
        """Trials that count against the budget."""
        return self.ledger.budget_used

    @property
    def fatal_error(self) -> TunerError | None:
        """Why no further trial is begun."""
        return self.outcomes.error

    def running_numbers(self) -> set[int]:
        """Our running trials: those that workers carry out, that drew the same, and that were refused."""
        return {*self.running, *self.duplicates.numbers(), *self.outcomes.suspected()}

    # -- what an engine calls

    def next_job(self) -> Job | None:
        """The next trial as a job; None when the budget is handed out, time is up or the search is stopping."""
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
            except UpdateFinishedTrialError:  # somebody else has ended it
                self.study.forget_running(trial.number)
                continue
            if running is not None:
                return self.job(running)
        return None

    def job(self, running: RunningTrial) -> Job:
        kept = self.retention.folder_of(running.proposal)
        assignment = replace(
            self.make_assignment(running.run),
            checkpoint_folder=kept,
            keep_best_weights=self.search_settings.keep > 0,
            micro_batches=micro_batch_count(
                running.attempt, running.killed, self.search_settings.retries
            ),
        )
        return Job(
            running.number,
            "tuner.training.worker_jobs:run_trial",
            assignment,
            (kept,) if kept else (),
            stall=stall_of(self.space.settings.engine, paced=True),
        )

    def should_ask(self) -> bool:
        """Whether to look for a trial: nobody stops the search, it is not too late, and it was not looked just now."""
        if self.should_stop() or self.fatal_error is not None:
            return False
        if self.coordination.is_shared and time.monotonic() - self.last_empty_poll < POLL_SECONDS:
            return False
        return not self.is_past_timeout()

    def propose_trial(self) -> Trial | None:
        """A trial of the study, while the budget has room for one."""
        if self.coordination.is_shared:
            self.ledger.read_history(self.running_numbers())
        return (
            self.proposer.propose_trial(self.ledger.proposal_count)
            if self.has_budget_left()
            else None
        )

    def has_budget_left(self) -> bool:
        return (
            self.budget_used + self.ledger.running_elsewhere + len(self.running_numbers())
            < self.proposer.trial_budget()
        )

    def is_past_timeout(self) -> bool:
        return (
            self.search_settings.timeout is not None
            and time.monotonic() - self.since > parse_duration(self.search_settings.timeout)
        )

    def waits_for_others(self) -> bool:
        """Whether other coordinators run trials that we would make again if they died."""
        return self.ledger.running_elsewhere > 0 and not self.is_past_timeout()

    def start_trial(self, trial: Trial) -> RunningTrial | None:
        """The trial with its parameters fixed; None when another with the same parameters gives it its result."""
        attrs = trial.user_attrs
        proposal = int(attrs.get(PROPOSAL, self.ledger.proposal_count))
        self.ledger.proposal_count += PROPOSAL not in attrs
        with self.study.window():
            run = self.space.sample(trial, seed=derive_seed(self.search_settings.seed, proposal))
        self.study.flush_writes(trial, now=True)
        crash_point("search.drawn")
        others = [*self.running.values(), *self.outcomes.suspected().values()]
        if self.duplicates.takes(trial, run, proposal, others):
            return None
        self.started_at += 1
        running = self.running[trial.number] = RunningTrial(
            trial,
            run,
            proposal,
            int(attrs.get(ATTEMPT, 1)),
            params_key(trial.params),
            self.started_at,
            is_default=bool(attrs.get(IS_DEFAULT_RECIPE)),
            killed=int(attrs.get(KILLED, 0)),
            refused=bool(attrs.get(REFUSED)),
        )
        return running

    def report(self, job: Job, epoch: Epoch) -> bool:
        """Hands an epoch to the pruner; False: the trial shall stop."""
        running = self.running[job.number]
        try:
            running.trial.report(epoch.scores[str(self.search_settings.metric)], epoch.number)
            self.listener.on_epoch(running, epoch)
            self.study.flush_writes(running.trial)
            crash_point("search.reported")
            # after its last epoch a trial has cost what it costs; pruned, it would lose its result
            judged = not running.is_default and epoch.number < running.epochs
            running.is_pruned = judged and self.study.should_prune(running.trial)
        except UpdateFinishedTrialError:
            return False  # somebody else has ended it
        self.outcomes.accepted(running)
        return not (running.is_pruned or self.should_stop())

    def on_job_end(self, job: Job, outcome: Outcome) -> None:
        """Records how a trial ended, once."""
        self.last_empty_poll = float("-inf")
        self.outcomes.record(self.running.pop(job.number), outcome, self.started_at)

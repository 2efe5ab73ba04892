"""The coordinator: the one owner of a study. It asks Optuna, hands out runs, hears epochs, prunes, and crowns the winner."""

import time
from collections.abc import Callable
from dataclasses import replace

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from tuner.config.run import Run, seconds
from tuner.config.space import Space
from tuner.errors import TunerError
from tuner.files.checkpoint_files import Keeping
from tuner.files.crash_points import crash
from tuner.jobs import Job, Outcome, stall_of
from tuner.messages import Assignment, Epoch
from tuner.search import history
from tuner.search.duplicate_trials import DuplicateTrials
from tuner.search.history import ATTEMPT, DEFAULT, KILLED, REFUSED, ROOT, key_of
from tuner.search.leases import Alone, Leases
from tuner.search.ledger import Ledger
from tuner.search.proposals import Asker
from tuner.search.running_trial import Listener, RunningTrial
from tuner.search.samplers import mix
from tuner.search.trial_outcomes import TrialOutcomes
from tuner.search.windowed_study import WindowedStudy

LOOK = 1.0  # seconds between looks at whether other coordinators left something to do


class Coordinator:
    """`next_job`, `report` and `ended` are what an engine calls; everything is decided from the study's history."""

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        order: Callable[[Run], Assignment],
        listener: Listener,
        stopping: Callable[[], bool],
        leases: Alone | Leases | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.study = WindowedStudy(study)
        self.space, self.order, self.listener, self.stopping = space, order, listener, stopping
        self.search, self.asker = space.settings.search, Asker(self.study, space)
        self.leases = leases or Alone()
        self.ledger = Ledger(self.study, self.asker, self.leases)
        self.running: dict[int, RunningTrial] = {}
        self.since, self.begun = time.monotonic(), 0  # when, and how many trials
        # when there was nothing to hand out, where others may change that
        self.looked = float("-inf")
        self.leases.exclusively(lambda: self.ledger.read(set()))
        self.keeping = keeping or Keeping(None, 0)
        self.keeping.begin(history.over(self.study))
        self.duplicates = DuplicateTrials(self.study, self.ledger, listener)
        self.outcomes = TrialOutcomes(
            self.study,
            self.search,
            self.ledger,
            self.duplicates,
            self.keeping,
            listener,
            stopping,
        )

    @property
    def closed(self) -> int:
        """Trials that count against the budget."""
        return self.ledger.closed

    @property
    def error(self) -> TunerError | None:
        """Why no further trial is begun."""
        return self.outcomes.error

    def held(self) -> set[int]:
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
        while self.willing():
            trial = self.leases.exclusively(self.ask)
            if trial is None:
                self.looked = time.monotonic() if self.leases.shared else self.looked
                return None
            crash("search.asked")
            try:
                running = self.begin(trial)
            except UpdateFinishedTrialError:  # somebody else has ended it
                self.study.lose(trial.number)
                continue
            if running is not None:
                return self.job(running)
        return None

    def job(self, running: RunningTrial) -> Job:
        kept = self.keeping.place(running.proposal)
        assignment = replace(
            self.order(running.run),
            checkpoints=kept,
            keep=self.search.keep > 0,
            parts=self.outcomes.parts(running),
        )
        return Job(
            running.number,
            "tuner.training.worker_jobs:carry",
            assignment,
            (kept,) if kept else (),
            stall=stall_of(self.space.settings.engine, paced=True),
        )

    def willing(self) -> bool:
        """Whether to look for a trial: nobody stops the search, it is not too late, and it was not looked just now."""
        if self.stopping() or self.error is not None:
            return False
        if self.leases.shared and time.monotonic() - self.looked < LOOK:
            return False
        return not self.late()

    def ask(self) -> Trial | None:
        """A trial of the study, while the budget has room for one."""
        if self.leases.shared:
            self.ledger.read(self.held())
        return self.asker.ask(self.ledger.roots) if self.wanted() else None

    def wanted(self) -> bool:
        return self.closed + self.ledger.elsewhere + len(self.held()) < self.asker.budget()

    def late(self) -> bool:
        return self.search.timeout is not None and time.monotonic() - self.since > seconds(
            self.search.timeout
        )

    def waits(self) -> bool:
        """Whether other coordinators run trials that we would make again if they died."""
        return self.ledger.elsewhere > 0 and not self.late()

    def begin(self, trial: Trial) -> RunningTrial | None:
        """The trial with its parameters fixed; None when another with the same parameters gives it its result."""
        attrs = trial.user_attrs
        proposal = int(attrs.get(ROOT, self.ledger.roots))
        self.ledger.roots += ROOT not in attrs
        with self.study.window():
            run = self.space.sample(trial, seed=mix(self.search.seed, proposal))
        self.study.write(trial, now=True)
        crash("search.drawn")
        others = [*self.running.values(), *self.outcomes.suspected().values()]
        if self.duplicates.takes(trial, run, proposal, others):
            return None
        self.begun += 1
        running = self.running[trial.number] = RunningTrial(
            trial,
            run,
            proposal,
            int(attrs.get(ATTEMPT, 1)),
            key_of(trial.params),
            self.begun,
            default=bool(attrs.get(DEFAULT)),
            killed=int(attrs.get(KILLED, 0)),
            refused=bool(attrs.get(REFUSED)),
        )
        return running

    def report(self, job: Job, epoch: Epoch) -> bool:
        """Hands an epoch to the pruner; False: the trial shall stop."""
        running = self.running[job.number]
        try:
            running.trial.report(epoch.scores[str(self.search.metric)], epoch.number)
            self.listener.epoch(running, epoch)
            self.study.write(running.trial)
            crash("search.reported")
            # after its last epoch a trial has cost what it costs; pruned, it would lose its result
            judged = not running.default and epoch.number < running.epochs
            running.pruned = judged and self.study.prunes(running.trial)
        except UpdateFinishedTrialError:
            return False  # somebody else has ended it
        self.outcomes.accepted(running)
        return not (running.pruned or self.stopping())

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Records how a trial ended, once."""
        self.looked = float("-inf")
        self.outcomes.record(self.running.pop(job.number), outcome, self.begun)

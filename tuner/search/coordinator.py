"""The coordinator: the one owner of a study. It asks Optuna, hands out runs, hears epochs, prunes, and crowns the winner."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.config.run import Run, seconds
from tuner.config.space import Space
from tuner.errors import TunerError
from tuner.files.checkpoint_files import Keeping
from tuner.files.crash_points import crash
from tuner.jobs import Job, Outcome, refusal, stall_of
from tuner.messages import Assignment, Epoch, Result
from tuner.search import history
from tuner.search.failures import Failures
from tuner.search.history import (
    ATTEMPT,
    BEST_EPOCH,
    DEFAULT,
    FINAL,
    REASON,
    ROOT,
    SAME_AS,
    SCORES,
    TRACE,
    key_of,
    rank,
)
from tuner.search.leases import Alone, Leases
from tuner.search.ledger import Ledger
from tuner.search.proposals import Asker
from tuner.search.samplers import mix
from tuner.search.windowed_study import WindowedStudy

LOOK = 1.0  # seconds between looks at whether other coordinators left something to do


class Listener(Protocol):
    """Who is told what happens: the console, the dashboard's artifacts."""

    def epoch(self, trial: "Live", epoch: Epoch) -> None: ...
    def ended(self, trial: FrozenTrial, run: Run, result: Result | None) -> None: ...
    def files(self, trial: Trial, run: Run, result: Result) -> None: ...


@dataclass
class Live:
    """A trial being carried out. `followers` drew the same parameters while it ran."""

    trial: Trial
    run: Run
    root: int
    attempt: int
    default: bool = False  # what all others are compared with is seen to its end
    pruned: bool = False
    followers: list[tuple[Trial, int]] = field(default_factory=list)  # with their roots
    key: str = ""  # of its parameters


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
        self.live: dict[int, Live] = {}
        self.error: TunerError | None = None
        self.failures, self.begun = Failures(), time.monotonic()
        self.looked = float(
            "-inf"
        )  # when there was nothing to hand out, where others may change that
        self.leases.exclusively(lambda: self.ledger.read(set()))
        self.keeping = keeping or Keeping(None, 0)
        self.keeping.begin(history.over(self.study))

    @property
    def closed(self) -> int:
        """Trials that count against the budget."""
        return self.ledger.closed

    def held(self) -> set[int]:
        """Our running trials: those that workers carry out, and those that drew the same."""
        return {
            *self.live,
            *(follower.number for live in self.live.values() for follower, _ in live.followers),
        }

    # -- what an engine calls

    def next_job(self) -> Job | None:
        """The next trial as a job; None when the budget is handed out, time is up or the search is stopping."""
        while self.willing():
            trial = self.leases.exclusively(self.ask)
            if trial is None:
                self.looked = time.monotonic() if self.leases.shared else self.looked
                return None
            crash("search.asked")
            try:
                live = self.begin(trial)
            except UpdateFinishedTrialError:
                self.study.lose(
                    trial.number
                )  # another coordinator took the trial while this one was not heard of
                continue
            if live is not None:
                kept = self.keeping.place(live.root)
                assignment = replace(
                    self.order(live.run), checkpoints=kept, keep=self.search.keep > 0
                )
                return Job(
                    trial.number,
                    "tuner.training.worker_jobs:carry",
                    assignment,
                    (kept,) if kept else (),
                    stall=stall_of(self.space.settings.engine, paced=True),
                )
        return None

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
        return self.search.timeout is not None and time.monotonic() - self.begun > seconds(
            self.search.timeout
        )

    def waits(self) -> bool:
        """Whether other coordinators run trials that we would make again if they died."""
        return self.ledger.elsewhere > 0 and not self.late()

    def begin(self, trial: Trial) -> Live | None:
        """The trial with its parameters fixed; None when they are known already and their result is reused."""
        attrs = (
            trial._cached_frozen_trial.user_attrs
        )  # as it was asked for: reading it again costs 2 ms
        root = int(attrs.get(ROOT, self.ledger.roots))
        self.ledger.roots += ROOT not in attrs
        with self.study.window():
            run = self.space.sample(trial, seed=mix(self.search.seed, root))
        self.study.write(trial, now=True)
        crash("search.drawn")
        twin = self.ledger.known.get(key_of(trial.params))
        if twin is not None:
            self.repeat(trial, run, twin)
            return None
        key = key_of(trial.params)
        for other in self.live.values():
            if other.key == key:
                other.followers.append((trial, root))
                return None
        live = self.live[trial.number] = Live(
            trial, run, root, int(attrs.get(ATTEMPT, 1)), bool(attrs.get(DEFAULT)), key=key
        )
        return live

    def repeat(self, trial: Trial, run: Run, twin: int) -> None:
        """Gives a trial the result of the finished one with equal parameters."""
        found = self.study.get_trials(deepcopy=False)[twin]
        trial.set_user_attr(SAME_AS, twin)
        for step, value in sorted(found.intermediate_values.items()):
            trial.report(value, step)
        crash("search.repeating")
        values = found.values if found.state == TrialState.COMPLETE else None
        ended = self.study.tell(trial.number, values, found.state)
        self.ledger.close(ended)
        self.listener.ended(ended, run, None)

    def report(self, job: Job, epoch: Epoch) -> bool:
        """Hands an epoch to the pruner; False: the trial shall stop."""
        live = self.live[job.number]
        live.trial.report(epoch.scores[str(self.search.metric)], epoch.number)
        self.listener.epoch(live, epoch)
        try:
            self.study.write(live.trial)
            crash("search.reported")
            live.pruned = not live.default and self.study.prunes(
                live.trial
            )  # what all are compared with is seen to its end
        except UpdateFinishedTrialError:
            return False  # as above
        return not (live.pruned or self.stopping())

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Records how a trial ended, once."""
        live = self.live.pop(job.number)
        self.looked = float("-inf")
        try:
            self.record(live, outcome)
        except UpdateFinishedTrialError:
            self.study.lose(job.number)  # as above
        for follower, root in live.followers:
            self.follow(follower, root, live)

    def record(self, live: Live, outcome: Outcome) -> None:
        if outcome.kind == "done":
            self.finish(live, outcome.value)
        elif outcome.kind == "refused":
            self.ledger.again(
                live.trial, live.root, "; ".join(outcome.problems)[:500], count=False
            )  # data or disk: until it is mended
            self.error = self.error or refusal(outcome)
        elif outcome.reason == "interrupted" or (outcome.kind == "lost" and self.stopping()):
            self.ledger.again(live.trial, live.root, "interrupted", count=False)
        elif outcome.kind == "lost" and live.attempt <= self.search.retries:
            self.ledger.again(live.trial, live.root, outcome.reason, count=True)
        else:
            self.give_up(live, outcome)

    def finish(self, live: Live, result: Result) -> None:
        trial, number = live.trial, live.trial.number
        if result.state == "stopped" and not live.pruned:
            self.ledger.again(live.trial, live.root, "interrupted", count=False)
            return
        trial.set_user_attr("seconds", round(result.seconds, 3))
        if result.best:
            trial.set_user_attr(BEST_EPOCH, result.best)
            trial.set_user_attr(SCORES, result.epochs[result.best - 1].scores)
        if result.state in ("diverged", "oom"):
            trial.set_user_attr(REASON, f"{result.state}: {result.reason}")
        self.listener.files(
            trial, live.run, result
        )  # artifacts can be attached only while a trial is running
        crash("search.files")
        if result.state == "complete":
            ended = self.study.tell(
                number, result.epochs[result.best - 1].scores[str(self.search.metric)]
            )
            self.failures.reasons.clear()
        else:
            ended = self.study.tell(number, state=TrialState.PRUNED)
        crash("search.told")
        self.keeping.ended(live.root, rank(ended))
        self.ledger.close(ended)
        self.listener.ended(ended, live.run, result)
        if result.state in ("diverged", "oom"):
            self.count_failure(f"{result.state}: {result.reason}", alike=False)

    def give_up(self, live: Live, outcome: Outcome) -> None:
        """Fails a trial for good: its code raised, or its worker died at the last attempt."""
        live.trial.set_user_attr(FINAL, True)
        if outcome.trace:
            live.trial.set_user_attr(TRACE, outcome.trace[-4000:])
        self.ledger.fail(live.trial.number, outcome.reason)
        self.keeping.ended(live.root)
        ended = self.study.get_trials(deepcopy=False)[live.trial.number]
        self.ledger.close(ended)
        self.listener.ended(ended, live.run, None)
        self.count_failure(outcome.reason, alike=True)

    def count_failure(self, reason: str, *, alike: bool) -> None:
        self.error = (
            self.failures.add(reason, alike=alike, completed=bool(history.completed(self.study)))
            or self.error
        )

    def follow(self, trial: Trial, root: int, live: Live) -> None:
        twin = self.ledger.known.get(key_of(live.trial.params))
        if twin is not None:
            with contextlib.suppress(UpdateFinishedTrialError):  # as above
                self.repeat(trial, live.run, twin)
        else:
            self.ledger.again(trial, root, "its twin did not end", count=False)

"""The coordinator: the one owner of a study. It asks Optuna, hands out runs, hears epochs, prunes, and crowns the winner."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner import errors, history
from tuner.asking import Asker
from tuner.errors import NoUsableTrial, TunerError
from tuner.history import ATTEMPT, BEST_EPOCH, DEFAULT, FINAL, REASON, ROOT, SAME_AS, SCORES, TRACE, key_of
from tuner.jobs import Job, Outcome
from tuner.orders import Assignment, Epoch, Result
from tuner.run import Run, seconds
from tuner.samplers import mix
from tuner.space import Space
from tuner.window import WindowedStudy

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
MAX_ALIKE, MAX_FAILURES = 3, 10


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
    ) -> None:
        self.study = WindowedStudy(study)
        self.space, self.order, self.listener, self.stopping = space, order, listener, stopping
        self.search, self.asker = space.settings.search, Asker(self.study, space)
        self.live: dict[int, Live] = {}
        self.error: TunerError | None = None
        self.begun = time.monotonic()
        self.failures: list[str] = []  # reasons, since the last trial that completed
        self.known: dict[str, int] = {}  # parameters -> number of the trial that ended with them
        self.roots = 0  # root trials asked so far
        self.closed = 0  # trials that count against the budget
        self.recover()

    # -- history

    def recover(self) -> None:
        """Reads the study. Whatever is RUNNING has lost its coordinator: recorded as failed, and asked again."""
        trials = self.study.get_trials(deepcopy=False)
        if not trials:
            self.asker.begin()
        draws = history.roots(self.study)
        for t in trials:
            self.roots += ROOT not in t.user_attrs and t.state != TrialState.WAITING
            if t.state == TrialState.RUNNING:
                params = {**t.system_attrs.get("fixed_params", {}), **t.params}  # enqueued, but perhaps not drawn yet
                self.requeue(t.number, params, draws[t.number], t.user_attrs, "orphaned: the search was killed", count=False)
            elif t.state in ENDED:
                self.closed += 1
                self.known.setdefault(key_of(t.params), t.number)
            elif t.state == TrialState.FAIL and t.user_attrs.get(FINAL):
                self.closed += 1

    def requeue(self, number: int, params: dict[str, Any], root: int, attrs: dict[str, Any], reason: str, *, count: bool) -> None:
        """Records a lost attempt and asks for the same parameters again. `count`: it was one of the limited attempts."""
        marks = {ROOT: root, ATTEMPT: int(attrs.get(ATTEMPT, 1)) + count} | {k: v for k, v in attrs.items() if k == DEFAULT}
        # first the new one, then the end of the old one: a crash in between leaves an orphan that is swept again
        waiting = [t for t in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)) if t.user_attrs.get(ROOT) == marks[ROOT]]
        if not waiting:
            self.study.enqueue_trial(params, user_attrs=marks)
        self.fail(number, reason)

    def again(self, live: Live, reason: str, *, count: bool) -> None:
        self.requeue(live.trial.number, live.trial.params, live.root, live.trial.user_attrs, reason, count=count)

    def fail(self, number: int, reason: str) -> None:
        storage, trial_id = self.study._storage, self.study._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
        storage.set_trial_user_attr(trial_id, REASON, reason)
        self.study.tell(number, state=TrialState.FAIL)

    # -- what an engine calls

    def next_job(self) -> Job | None:
        """The next trial as a job; None when the budget is handed out, time is up or the search is stopping."""
        while self.wanted():
            trial = self.asker.ask(self.roots)
            if trial is None:
                return None
            live = self.begin(trial)
            if live is not None:
                return Job(trial.number, "tuner.work:carry", self.order(live.run))
        return None

    def wanted(self) -> bool:
        if self.stopping() or self.error is not None:
            return False
        if self.search.timeout is not None and time.monotonic() - self.begun > seconds(self.search.timeout):
            return False
        return self.closed + len(self.live) + sum(len(v.followers) for v in self.live.values()) < self.asker.budget()

    def begin(self, trial: Trial) -> Live | None:
        """The trial with its parameters fixed; None when they are known already and their result is reused."""
        attrs = trial._cached_frozen_trial.user_attrs  # as it was asked for: reading it again costs 2 ms
        root = int(attrs.get(ROOT, self.roots))
        self.roots += ROOT not in attrs
        with self.study.window():
            run = self.space.sample(trial, seed=mix(self.search.seed, root))
        self.study.write(trial, now=True)
        twin = self.known.get(key_of(trial.params))
        if twin is not None:
            self.repeat(trial, run, twin)
            return None
        key = key_of(trial.params)
        for other in self.live.values():
            if other.key == key:
                other.followers.append((trial, root))
                return None
        live = self.live[trial.number] = Live(trial, run, root, int(attrs.get(ATTEMPT, 1)), bool(attrs.get(DEFAULT)), key=key)
        return live

    def repeat(self, trial: Trial, run: Run, twin: int) -> None:
        """Gives a trial the result of the finished one with equal parameters."""
        found = self.study.get_trials(deepcopy=False)[twin]
        trial.set_user_attr(SAME_AS, twin)
        for step, value in sorted(found.intermediate_values.items()):
            trial.report(value, step)
        values = found.values if found.state == TrialState.COMPLETE else None
        ended = self.study.tell(trial.number, values, found.state)
        self.closed += 1
        self.listener.ended(ended, run, None)

    def report(self, job: Job, epoch: Epoch) -> bool:
        """Hands an epoch to the pruner; False: the trial shall stop."""
        live = self.live[job.number]
        live.trial.report(epoch.scores[str(self.search.metric)], epoch.number)
        self.listener.epoch(live, epoch)
        self.study.write(live.trial)
        live.pruned = not live.default and self.study.prunes(live.trial)  # what all are compared with is seen to its end
        return not (live.pruned or self.stopping())

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Records how a trial ended, once."""
        live = self.live.pop(job.number)
        if outcome.kind == "done":
            self.finish(live, outcome.value)
        elif outcome.kind == "refused":
            reason = "; ".join(outcome.problems)[:500]  # data or disk: the trial is asked again once that is mended
            self.again(live, reason, count=False)
            self.error = self.error or refusal(outcome)
        elif outcome.reason == "interrupted" or (outcome.kind == "lost" and self.stopping()):
            self.again(live, "interrupted", count=False)
        elif outcome.kind == "lost" and live.attempt <= self.search.retries:
            self.again(live, outcome.reason, count=True)
        else:
            self.give_up(live, outcome)
        for follower, root in live.followers:
            self.follow(follower, root, live)

    def finish(self, live: Live, result: Result) -> None:
        trial, number = live.trial, live.trial.number
        if result.state == "stopped" and not live.pruned:
            self.again(live, "interrupted", count=False)
            return
        trial.set_user_attr("seconds", round(result.seconds, 3))
        if result.best:
            trial.set_user_attr(BEST_EPOCH, result.best)
            trial.set_user_attr(SCORES, result.epochs[result.best - 1].scores)
        if result.state in ("diverged", "oom"):
            trial.set_user_attr(REASON, f"{result.state}: {result.reason}")
        self.listener.files(trial, live.run, result)  # artifacts can be attached only while a trial is running
        if result.state == "complete":
            ended = self.study.tell(number, result.epochs[result.best - 1].scores[str(self.search.metric)])
            self.failures.clear()
        else:
            ended = self.study.tell(number, state=TrialState.PRUNED)
        self.closed += 1
        self.known.setdefault(key_of(trial.params), number)
        self.listener.ended(ended, live.run, result)
        if result.state in ("diverged", "oom"):
            self.count_failure(f"{result.state}: {result.reason}", alike=False)

    def give_up(self, live: Live, outcome: Outcome) -> None:
        """Fails a trial for good: its code raised, or its worker died at the last attempt."""
        live.trial.set_user_attr(FINAL, True)
        if outcome.trace:
            live.trial.set_user_attr(TRACE, outcome.trace[-4000:])
        self.fail(live.trial.number, outcome.reason)
        self.closed += 1
        self.listener.ended(self.study.get_trials(deepcopy=False)[live.trial.number], live.run, None)
        self.count_failure(outcome.reason, alike=True)

    def count_failure(self, reason: str, *, alike: bool) -> None:
        """Stops a search that goes nowhere: 3 failures alike in a row, or 10 of any kind and none completed."""
        self.failures.append(reason)
        same = self.failures[-MAX_ALIKE:]
        if alike and len(same) == MAX_ALIKE and len(set(same)) == 1:
            self.error = NoUsableTrial(
                f"the last {MAX_ALIKE} trials failed alike: {reason}; nothing finished is lost, mend this and run the same command"
            )
        elif len(self.failures) >= MAX_FAILURES and not history.completed(self.study):
            counts = ", ".join(f"{n} x {r}" for r, n in Counter(self.failures).most_common(3))
            self.error = NoUsableTrial(
                f"{len(self.failures)} trials failed and none completed; first: {self.failures[0]}; in all: {counts}"
            )

    def follow(self, trial: Trial, root: int, live: Live) -> None:
        twin = self.known.get(key_of(live.trial.params))
        if twin is not None:
            self.repeat(trial, live.run, twin)
        else:
            self.requeue(trial.number, trial.params, root, trial.user_attrs, "its twin did not end", count=False)


def refusal(outcome: Outcome) -> TunerError:
    """A worker's TunerError, with its exit code, in this process."""
    kind: type[TunerError] = getattr(errors, outcome.reason, TunerError)
    return kind(*outcome.problems)

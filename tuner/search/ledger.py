"""What a study's trials come to: how many count against the budget, which parameters are known, which draws were made, what is orphaned."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.files.crash_points import crash
from tuner.search import history
from tuner.search.history import ATTEMPT, DEFAULT, FINAL, KILLED, REASON, REFUSED, ROOT, key_of
from tuner.search.leases import Alone, Leases
from tuner.search.optuna_internals import trial_id_of
from tuner.search.proposals import Asker
from tuner.search.windowed_study import WindowedStudy

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class Ledger:
    """Read when a search begins, and before each question where other coordinators write too; each trial is entered once."""

    def __init__(self, study: WindowedStudy, asker: Asker, leases: Alone | Leases) -> None:
        self.study, self.asker, self.leases = study, asker, leases
        self.counted: set[int] = set()  # numbers of the trials that count against the budget
        self.known: dict[str, int] = {}  # parameters -> number of the trial that ended with them
        self.roots = 0  # root trials asked so far
        self.elsewhere = 0  # trials that other coordinators run

    @property
    def closed(self) -> int:
        return len(self.counted)

    def read(self, held: set[int]) -> None:
        """`held` are the numbers of our running trials. One that runs and that nobody alive holds is recorded as failed, and asked again."""
        trials = self.study.get_trials(deepcopy=False)
        if not trials:
            self.asker.begin()
        orphans = self.leases.orphans(_running(trials, held))
        if orphans:
            draws = history.roots(self.study)
            for t in orphans:
                root, reason = draws[t.number], self.leases.orphaned
                self.requeue(t.number, history.asked(t), root, t.user_attrs, reason, count=False)
            trials = self.study.get_trials(deepcopy=False)
        self.withdraw(trials)
        self.roots = sum(ROOT not in t.user_attrs and t.state != TrialState.WAITING for t in trials)
        self.study.elsewhere = _running(trials, held)
        self.elsewhere = len(self.study.elsewhere)
        for t in trials:
            if t.number not in self.counted and t.state.is_finished():
                self.close(t)

    def close(self, t: FrozenTrial) -> None:
        """Enters a trial that has ended."""
        if _counts(t):
            self.counted.add(t.number)
            self.study.keep(t)
        if t.state in ENDED:
            self.known.setdefault(key_of(t.params), t.number)

    def again(
        self,
        trial: Trial,
        root: int,
        reason: str,
        *,
        count: bool,
        marks: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Ends a trial of ours and asks for it again, unless somebody else has ended it.

        `count`: it was an attempt. `marks`: what the next attempt must know of this one.
        """

        def requeue() -> None:
            state = self.study.storage.get_trial(trial_id_of(self.study, trial)).state
            if state == TrialState.RUNNING:
                attrs = {**trial.user_attrs, **marks}
                self.requeue(trial.number, trial.params, root, attrs, reason, count=count)

        self.leases.exclusively(requeue)
        self.study.lose(trial.number)

    def requeue(
        self,
        number: int,
        params: dict[str, Any],
        root: int,
        attrs: dict[str, Any],
        reason: str,
        *,
        count: bool,
    ) -> None:
        """Records a lost attempt and asks for the same parameters again. `count`: it was one of the limited attempts."""
        marks = {ROOT: root, ATTEMPT: int(attrs.get(ATTEMPT, 1)) + count} | {
            k: v for k, v in attrs.items() if k in (DEFAULT, KILLED, REFUSED)
        }
        # first the new one, then the end of the old one: a crash in between leaves an orphan that is swept again
        waiting = [
            t
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if t.user_attrs.get(ROOT) == marks[ROOT]
        ]
        if not waiting:
            self.study.enqueue_trial(params, user_attrs=marks)
        crash("search.requeued")
        try:
            self.fail(number, reason)
        except UpdateFinishedTrialError:  # who runs the trial ended it at this very moment
            self.withdraw(self.study.get_trials(deepcopy=False))

    def withdraw(self, trials: list[FrozenTrial]) -> None:
        """Fails each retry that waits although its draw runs or counts, so that no draw counts twice."""
        waiting = [t for t in trials if t.state == TrialState.WAITING and ROOT in t.user_attrs]
        if not waiting:
            return
        draws = history.roots(self.study)
        settled = {draws[t.number] for t in trials if t.state == TrialState.RUNNING or _counts(t)}
        for t in waiting:
            if t.user_attrs[ROOT] in settled and self.study.take(t):
                self.fail(t.number, "withdrawn: an earlier attempt of this trial goes on or ended")

    def fail(self, number: int, reason: str) -> None:
        trial_id = trial_id_of(self.study, number)
        self.study.storage.set_trial_user_attr(trial_id, REASON, reason)
        crash("search.failing")
        self.study.tell(number, state=TrialState.FAIL)


def _running(trials: list[FrozenTrial], held: set[int]) -> list[FrozenTrial]:
    """The trials that run and are not ours."""
    return [t for t in trials if t.state == TrialState.RUNNING and t.number not in held]


def _counts(t: FrozenTrial) -> bool:
    """Whether a trial counts against the budget: an attempt that is made again does not."""
    return t.state in ENDED or (t.state == TrialState.FAIL and bool(t.user_attrs.get(FINAL)))

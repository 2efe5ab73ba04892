"""What a study's trials come to: how many count against the budget, which parameters are known, which draws were made, what is orphaned."""

from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from tuner import history
from tuner.asking import Asker
from tuner.crash import crash
from tuner.history import ATTEMPT, DEFAULT, FINAL, REASON, ROOT, key_of
from tuner.leases import Alone, Leases
from tuner.window import WindowedStudy

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
        self.roots = sum(ROOT not in t.user_attrs and t.state != TrialState.WAITING for t in trials)
        running = [t for t in trials if t.state == TrialState.RUNNING and t.number not in held]
        orphans = {t.number for t in self.leases.orphans(running)}
        draws = history.roots(self.study) if orphans else {}
        for t in running:
            if t.number in orphans:
                params = {
                    **t.system_attrs.get("fixed_params", {}),
                    **t.params,
                }  # enqueued, but perhaps not drawn yet
                self.requeue(
                    t.number,
                    params,
                    draws[t.number],
                    t.user_attrs,
                    self.leases.orphaned,
                    count=False,
                )
        self.study.elsewhere = [t for t in running if t.number not in orphans]
        self.elsewhere = len(self.study.elsewhere)
        for t in trials:
            if t.number not in self.counted and t.state.is_finished():
                self.close(t)

    def close(self, t: FrozenTrial) -> None:
        """Enters a trial that has ended; an attempt that is made again does not count."""
        if t.state in ENDED or (t.state == TrialState.FAIL and t.user_attrs.get(FINAL)):
            self.counted.add(t.number)
            self.study.keep(t)
        if t.state in ENDED:
            self.known.setdefault(key_of(t.params), t.number)

    def again(self, trial: Trial, root: int, reason: str, *, count: bool) -> None:
        """Ends a trial of ours and asks for it again; where another coordinator took it, that one has. `count`: it was an attempt."""

        def requeue() -> None:
            if (
                not self.leases.shared
                or self.study._storage.get_trial(trial._trial_id).state == TrialState.RUNNING
            ):
                self.requeue(
                    trial.number, trial.params, root, trial.user_attrs, reason, count=count
                )

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
            k: v for k, v in attrs.items() if k == DEFAULT
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
        self.fail(number, reason)

    def fail(self, number: int, reason: str) -> None:
        storage, trial_id = (
            self.study._storage,
            self.study._storage.get_trial_id_from_study_id_trial_number(
                self.study._study_id, number
            ),
        )
        storage.set_trial_user_attr(trial_id, REASON, reason)
        crash("search.failing")
        self.study.tell(number, state=TrialState.FAIL)

"""What a study's trials come to: how many count against the budget, which parameters are known, which draws were made, what is orphaned."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.files.crash_points import crash_point
from tuner.search import history
from tuner.search.history import (
    ATTEMPT,
    FAILED_PERMANENTLY,
    IS_DEFAULT_RECIPE,
    KILLED,
    PROPOSAL,
    REASON,
    REFUSED,
    params_key,
)
from tuner.search.leases import SharedCoordination, SingleCoordinator
from tuner.search.optuna_internals import trial_id_of
from tuner.search.proposals import TrialProposer
from tuner.search.windowed_study import WindowedStudy

ENDED_STATES = (TrialState.COMPLETE, TrialState.PRUNED)


class Ledger:
    """Read when a search begins, and before each question where other coordinators write too; each trial is entered once."""

    def __init__(
        self,
        study: WindowedStudy,
        proposer: TrialProposer,
        coordination: SingleCoordinator | SharedCoordination,
    ) -> None:
        self.study, self.proposer, self.coordination = study, proposer, coordination
        self.counted_numbers: set[int] = (
            set()
        )  # numbers of the trials that count against the budget
        self.number_by_params: dict[
            str, int
        ] = {}  # parameters -> number of the trial that ended with them
        self.proposal_count = 0  # root trials asked so far
        self.running_elsewhere = 0  # trials that other coordinators run

    @property
    def budget_used(self) -> int:
        return len(self.counted_numbers)

    def read_history(self, own_running: set[int]) -> None:
        """`held` are the numbers of our running trials. One that runs and that nobody alive holds is recorded as failed, and asked again."""
        trials = self.study.get_trials(deepcopy=False)
        if not trials:
            self.proposer.enqueue_first_trials()
        orphans = self.coordination.find_orphans(_running_elsewhere(trials, own_running))
        if orphans:
            draws = history.proposal_numbers(self.study)
            for t in orphans:
                root, reason = draws[t.number], self.coordination.orphan_reason
                self.requeue(
                    t.number,
                    history.requested_params(t),
                    root,
                    t.user_attrs,
                    reason,
                    counts_as_attempt=False,
                )
            trials = self.study.get_trials(deepcopy=False)
        self.withdraw_settled_retries(trials)
        self.proposal_count = sum(
            PROPOSAL not in t.user_attrs and t.state != TrialState.WAITING for t in trials
        )
        self.study.running_elsewhere = _running_elsewhere(trials, own_running)
        self.running_elsewhere = len(self.study.running_elsewhere)
        for t in trials:
            if t.number not in self.counted_numbers and t.state.is_finished():
                self.enter_ended(t)

    def enter_ended(self, trial: FrozenTrial) -> None:
        """Enters a trial that has ended."""
        if _counts_against_budget(trial):
            self.counted_numbers.add(trial.number)
            self.study.add_ended(trial)
        if trial.state in ENDED_STATES:
            self.number_by_params.setdefault(params_key(trial.params), trial.number)

    def retry_own(
        self,
        trial: Trial,
        proposal: int,
        reason: str,
        *,
        counts_as_attempt: bool,
        marks: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Ends a trial of ours and asks for it again, unless somebody else has ended it.

        `count`: it was an attempt. `marks`: what the next attempt must know of this one.
        """

        def requeue() -> None:
            state = self.study.storage.get_trial(trial_id_of(self.study, trial)).state
            if state == TrialState.RUNNING:
                attrs = {**trial.user_attrs, **marks}
                self.requeue(
                    trial.number,
                    trial.params,
                    proposal,
                    attrs,
                    reason,
                    counts_as_attempt=counts_as_attempt,
                )

        self.coordination.run_exclusively(requeue)
        self.study.forget_running(trial.number)

    def requeue(
        self,
        number: int,
        params: dict[str, Any],
        proposal: int,
        attrs: dict[str, Any],
        reason: str,
        *,
        counts_as_attempt: bool,
    ) -> None:
        """Records a lost attempt and asks for the same parameters again. `count`: it was one of the limited attempts."""
        marks = {PROPOSAL: proposal, ATTEMPT: int(attrs.get(ATTEMPT, 1)) + counts_as_attempt} | {
            k: v for k, v in attrs.items() if k in (IS_DEFAULT_RECIPE, KILLED, REFUSED)
        }
        # first the new one, then the end of the old one: a crash in between leaves an orphan that is swept again
        waiting = [
            t
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if t.user_attrs.get(PROPOSAL) == marks[PROPOSAL]
        ]
        if not waiting:
            self.study.enqueue_trial(params, user_attrs=marks)
        crash_point("search.requeued")
        try:
            self.mark_failed(number, reason)
        except UpdateFinishedTrialError:  # who runs the trial ended it at this very moment
            self.withdraw_settled_retries(self.study.get_trials(deepcopy=False))

    def withdraw_settled_retries(self, trials: list[FrozenTrial]) -> None:
        """Fails each retry that waits although its draw runs or counts, so that no draw counts twice."""
        waiting = [t for t in trials if t.state == TrialState.WAITING and PROPOSAL in t.user_attrs]
        if not waiting:
            return
        draws = history.proposal_numbers(self.study)
        settled = {
            draws[t.number]
            for t in trials
            if t.state == TrialState.RUNNING or _counts_against_budget(t)
        }
        for t in waiting:
            if t.user_attrs[PROPOSAL] in settled and self.study.start_enqueued(t):
                self.mark_failed(
                    t.number, "withdrawn: an earlier attempt of this trial goes on or ended"
                )

    def mark_failed(self, number: int, reason: str) -> None:
        trial_id = trial_id_of(self.study, number)
        self.study.storage.set_trial_user_attr(trial_id, REASON, reason)
        crash_point("search.failing")
        self.study.tell(number, state=TrialState.FAIL)


def _running_elsewhere(trials: list[FrozenTrial], held: set[int]) -> list[FrozenTrial]:
    """The trials that run and are not ours."""
    return [t for t in trials if t.state == TrialState.RUNNING and t.number not in held]


def _counts_against_budget(trial: FrozenTrial) -> bool:
    """Whether a trial counts against the budget: an attempt that is made again does not."""
    return trial.state in ENDED_STATES or (
        trial.state == TrialState.FAIL and bool(trial.user_attrs.get(FAILED_PERMANENTLY))
    )

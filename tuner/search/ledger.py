"""The coordinator's count of a study's trials.

It knows which trials used the budget, which parameters have a result, how many proposals were
made, and which trials are orphans.
"""

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
RETRY_ATTRIBUTES = (IS_DEFAULT_RECIPE, KILLED, REFUSED)  # what a retry takes over of a trial


class Ledger:
    """The count of a study's trials.

    It is read from the study when a search begins and, where other coordinators write too, before
    each proposal. Each trial is entered once.
    """

    def __init__(
        self,
        study: WindowedStudy,
        proposer: TrialProposer,
        coordination: SingleCoordinator | SharedCoordination,
    ) -> None:
        self.study, self.proposer, self.coordination = study, proposer, coordination
        self.entered_numbers: set[int] = set()  # the trials that have ended
        self.counted_numbers: set[int] = set()  # those of them that count against the budget
        # parameters -> the number of the trial that ended with them
        self.number_by_params: dict[str, int] = {}
        self.proposal_count = 0  # proposals made so far
        self.running_elsewhere = 0  # trials that other coordinators run

    @property
    def budget_used(self) -> int:
        return len(self.counted_numbers)

    def read_history(self, own_running: set[int]) -> None:
        """Bring the ledger up to date with the study.

        An orphan is recorded as failed, and its parameters are enqueued again.

        Args:
            own_running: The numbers of the trials that this coordinator runs.
        """
        trials = self.study.get_trials(deepcopy=False)
        if all(history.TAKEN_FROM in t.user_attrs for t in trials):
            self.proposer.enqueue_first_trials()
        orphans = self.coordination.find_orphans(_running_elsewhere(trials, own_running))
        if orphans:
            self._requeue_orphans(orphans)
            trials = self.study.get_trials(deepcopy=False)
        self.withdraw_settled_retries(trials)
        self.proposal_count = sum(
            PROPOSAL not in t.user_attrs and t.state != TrialState.WAITING for t in trials
        )
        self.study.running_elsewhere = _running_elsewhere(trials, own_running)
        self.running_elsewhere = len(self.study.running_elsewhere)
        for t in trials:
            if t.number not in self.entered_numbers and t.state.is_finished():
                self.enter_ended(t)

    def _requeue_orphans(self, orphans: list[FrozenTrial]) -> None:
        proposals = history.proposal_numbers(self.study)
        for t in orphans:
            self.requeue(
                t.number,
                history.requested_params(t),
                proposals[t.number],
                t.user_attrs,
                self.coordination.orphan_reason,
                counts_as_attempt=False,
            )

    def enter_ended(self, trial: FrozenTrial) -> None:
        """Enter a trial that has ended."""
        self.entered_numbers.add(trial.number)
        if _counts_against_budget(trial):
            self.counted_numbers.add(trial.number)
        if trial.state in ENDED_STATES:
            self.study.add_ended(trial)
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
        """End a trial of this coordinator and enqueue it again, unless another process ended it.

        Args:
            trial: The running trial.
            proposal: The proposal that the trial carries out.
            reason: Why the trial ends.
            counts_as_attempt: Whether the trial used one of its limited attempts.
            marks: Attributes of the trial that its retry must have.
        """

        def requeue_if_running() -> None:
            state = self.study.storage.get_trial(trial_id_of(self.study, trial)).state
            if state == TrialState.RUNNING:
                self.requeue(
                    trial.number,
                    trial.params,
                    proposal,
                    {**trial.user_attrs, **marks},
                    reason,
                    counts_as_attempt=counts_as_attempt,
                )

        self.coordination.run_exclusively(requeue_if_running)
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
        """Record a trial as failed and enqueue a retry with the same parameters.

        Args:
            number: The trial's number.
            params: Its parameters.
            proposal: The proposal that it carries out.
            attrs: Its attributes; the retry gets those of RETRY_ATTRIBUTES.
            reason: Why the trial failed.
            counts_as_attempt: Whether the trial used one of its limited attempts.
        """
        marks = {
            PROPOSAL: proposal,
            ATTEMPT: int(attrs.get(ATTEMPT, 1)) + counts_as_attempt,
            **{key: value for key, value in attrs.items() if key in RETRY_ATTRIBUTES},
        }
        # The retry is enqueued before the trial ends. A crash in between leaves an orphan, and an
        # orphan is requeued when the search continues.
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not any(t.user_attrs.get(PROPOSAL) == proposal for t in waiting):
            self.study.enqueue_trial(params, user_attrs=marks)
        crash_point("search.requeued")
        try:
            self.mark_failed(number, reason)
        except UpdateFinishedTrialError:  # the coordinator that runs the trial ended it just now
            self.withdraw_settled_retries(self.study.get_trials(deepcopy=False))

    def withdraw_settled_retries(self, trials: list[FrozenTrial]) -> None:
        """Fail each waiting retry whose proposal runs or has ended, so that none counts twice."""
        waiting = [t for t in trials if t.state == TrialState.WAITING and PROPOSAL in t.user_attrs]
        if not waiting:
            return
        proposals = history.proposal_numbers(self.study)
        settled = {
            proposals[t.number]
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


def _running_elsewhere(trials: list[FrozenTrial], own_running: set[int]) -> list[FrozenTrial]:
    """Return the running trials that this coordinator does not run."""
    return [t for t in trials if t.state == TrialState.RUNNING and t.number not in own_running]


def _counts_against_budget(trial: FrozenTrial) -> bool:
    """Return whether a trial counts.

    A failed attempt that is made again does not, and neither does a trial of another study.
    """
    if history.TAKEN_FROM in trial.user_attrs:
        return False
    return trial.state in ENDED_STATES or (
        trial.state == TrialState.FAIL and bool(trial.user_attrs.get(FAILED_PERMANENTLY))
    )

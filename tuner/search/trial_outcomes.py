"""What happens when the job of a trial has ended.

The result is recorded, or the trial is retried, or the search ends because of it.
"""

from collections.abc import Callable

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.config.run import SearchSettings
from tuner.errors import StorageError, TunerError
from tuner.files.checkpoint_files import CheckpointRetention
from tuner.files.crash_points import crash_point
from tuner.jobs import Outcome, to_tuner_error
from tuner.messages import Epoch, TrialResult
from tuner.search import history
from tuner.search.duplicate_trials import DuplicateTrials
from tuner.search.failures import FailureLimits
from tuner.search.history import (
    BEST_EPOCH,
    BEST_TEMPERATURE,
    BEST_THRESHOLDS,
    COSTS,
    FAILED_PERMANENTLY,
    KILLED,
    REASON,
    REFUSED,
    RETRAINED_EPOCHS,
    SCORES,
    TEMPERATURE,
    THRESHOLDS,
    TRACEBACK,
    trial_rank,
)
from tuner.search.ledger import ENDED_STATES, Ledger
from tuner.search.retraining import choose_epoch, count_for_noise
from tuner.search.running_trial import RunningTrial, SearchListener
from tuner.search.windowed_study import WindowedStudy

OUT_OF_TIME = "ended by search.time"
SUSPECTS = 3  # trials refused in a row that end the search


class TrialOutcomes:
    """Records how trials ended. `error` ends the search: no further trial is begun.

    A worker may refuse a trial for a reason that concerns every trial, such as missing data, or for
    a reason that lies in the trial's own parameters. So the search goes on after a refusal, and the
    refused trial stays open as a suspect. When a trial that was begun later is accepted, the cause
    lies in the suspects' own parameters, and they are pruned. When other trials are refused too, or
    when there is no trial to compare with, the search ends. The next run retries the suspects.
    """

    def __init__(
        self,
        study: WindowedStudy,
        search: SearchSettings,
        ledger: Ledger,
        duplicates: DuplicateTrials,
        retention: CheckpointRetention,
        listener: SearchListener,
        should_stop: Callable[[], bool],
    ) -> None:
        self.study, self.search, self.ledger, self.duplicates = study, search, ledger, duplicates
        self.retention, self.listener, self.should_stop = retention, listener, should_stop
        self.failures = FailureLimits()
        self.error: TunerError | None = None
        self.suspects: list[tuple[RunningTrial, Outcome]] = []
        self._begun = 0  # how many trials this process had begun when the last suspect was refused
        self._blamed: set[tuple[str, ...]] = set()  # problems that lie in a trial's own parameters

    def suspected(self) -> dict[int, RunningTrial]:
        """Return the suspects by number."""
        return {running.number: running for running, _ in self.suspects}

    def record(self, running: RunningTrial, outcome: Outcome, begun: int) -> None:
        """Record how a trial's job ended.

        Args:
            running: The trial.
            outcome: How the job ended.
            begun: How many trials this process has begun.
        """
        try:
            self._decide(running, outcome, begun)
        except UpdateFinishedTrialError:
            self._lose(running)
        if running.number not in self.suspected():
            self.duplicates.original_ended(running)

    def _decide(self, running: RunningTrial, outcome: Outcome, begun: int) -> None:
        if outcome.kind == "done":
            self._finish(running, outcome.value)
        elif outcome.kind == "refused":
            self._refuse(running, outcome, begun)
        elif outcome.reason == "interrupted" or (outcome.kind == "lost" and self.should_stop()):
            self.ledger.retry_own(
                running.trial, running.proposal, "interrupted", counts_as_attempt=False
            )
        elif outcome.kind == "lost":
            self._lost_worker(running, outcome)
        else:
            self._give_up(running, outcome)

    def _finish(self, running: RunningTrial, result: TrialResult) -> None:
        trial = running.trial
        by_time = result.state == "stopped" and running.is_out_of_time and self._can_win(result)
        if result.state == "stopped" and not (running.is_pruned or by_time):
            self.ledger.retry_own(
                running.trial, running.proposal, "interrupted", counts_as_attempt=False
            )
            return
        failed = result.state in ("diverged", "oom", "over_limit")
        self._record_costs(trial, result)
        trial.set_user_attr("seconds", round(result.seconds, 3))
        if result.best_epoch:
            self._record_epochs(running, result)
        if failed:
            trial.set_user_attr(REASON, f"{result.state}: {result.reason}")
        if by_time:
            reached = f"after epoch {len(result.epochs)} of {running.epochs}"
            trial.set_user_attr(REASON, f"{OUT_OF_TIME} {reached}")
        # before `tell`, because artifacts can be attached only to a running trial
        self.listener.save_artifacts(trial, running.run, result)
        crash_point("search.files")
        if result.state == "complete" or by_time:
            value = result.epochs[result.best_epoch - 1].scores[str(self.search.metric)]
            ended = self.study.tell(running.number, value)
        else:
            ended = self.study.tell(running.number, state=TrialState.PRUNED)
        crash_point("search.told")
        self._close(running, ended, result)
        self.accepted(running)
        if failed:
            self._count_failure(f"{result.state}: {result.reason}", same_cause=False)
        else:
            self.failures.clear()

    def _can_win(self, result: TrialResult) -> bool:
        """Whether a trial that the time has ended can be the winner: it has a score, and its
        weights, which only a training that has ended leaves, are not needed.
        """
        return result.best_epoch > 0 and self.search.needs_no_weights

    def _record_epochs(self, running: RunningTrial, result: TrialResult) -> None:
        """Store the best epoch with its scores, and to which epoch the trial is trained again."""
        trial, run, best = running.trial, running.run, result.best_epoch
        trial.set_user_attr(BEST_EPOCH, best)
        trial.set_user_attr(SCORES, result.epochs[best - 1].scores)
        epoch = best
        if self.search.retrain and result.state == "complete":
            metric = str(self.search.metric)
            count = count_for_noise(self.study, run, metric)
            sign = history.sign_of(self.study.direction)
            epoch = choose_epoch(run.recipe, result.epochs, best, metric, sign, count)
            trial.set_user_attr(RETRAINED_EPOCHS, epoch)
        _record_fitted(trial, result.epochs[epoch - 1], TEMPERATURE, THRESHOLDS)
        if epoch != best:
            _record_fitted(trial, result.epochs[best - 1], BEST_TEMPERATURE, BEST_THRESHOLDS)

    def _record_costs(self, trial: Trial, result: TrialResult) -> None:
        """Store what the trial's model costs, and by how much of a limit it is above or below it:
        sampler TPE takes trials above 0 for worse than all others.
        """
        if not result.costs:
            return
        trial.set_user_attr(COSTS, dict(result.costs))
        limits = self.search.limits.values() if self.search.limits else {}
        for name, limit in limits.items():
            trial.set_constraint(name, result.costs[name] / limit - 1)

    def _close(
        self, running: RunningTrial, ended: FrozenTrial, result: TrialResult | None = None
    ) -> None:
        self.retention.on_trial_end(running.proposal, trial_rank(ended, self.study.direction))
        self.ledger.enter_ended(ended)
        self.listener.on_trial_end(ended, running.run, result)

    def _lost_worker(self, running: RunningTrial, outcome: Outcome) -> None:
        """Retry the trial, or fail it permanently after its last attempt."""
        killed = running.killed + (outcome.loss_cause == "memory")
        if running.attempt <= self.search.retries:
            marks = {KILLED: killed} if killed else {}
            self.ledger.retry_own(
                running.trial, running.proposal, outcome.reason, counts_as_attempt=True, marks=marks
            )
        elif killed == running.attempt:
            times = f", in each of {killed} attempts" if killed > 1 else ""
            self._exclude(running, f"oom: {outcome.reason}{times}")
        else:
            self._give_up(running, outcome)

    def _exclude(self, running: RunningTrial, reason: str) -> None:
        """End a trial whose own parameters are the cause.

        It is pruned and not failed, so that the sampler learns to avoid such parameters.
        """
        running.trial.set_user_attr(REASON, reason)
        self._close(running, self.study.tell(running.number, state=TrialState.PRUNED))
        self._count_failure(reason, same_cause=False)

    def _give_up(self, running: RunningTrial, outcome: Outcome) -> None:
        """Fail a trial permanently: its code raised, or its worker died at the last attempt."""
        running.trial.set_user_attr(FAILED_PERMANENTLY, True)
        if outcome.traceback:
            running.trial.set_user_attr(TRACEBACK, outcome.traceback[-4000:])
        self.ledger.mark_failed(running.number, outcome.reason)
        self._close(running, self.study.get_trials(deepcopy=False)[running.number])
        self._count_failure(outcome.reason, same_cause=True)

    def _count_failure(self, reason: str, *, same_cause: bool) -> None:
        completed = bool(history.completed_trials(self.study))
        self.error = (
            self.failures.record(reason, same_cause=same_cause, any_completed=completed)
            or self.error
        )

    def _lose(self, running: RunningTrial) -> None:
        """Drop a trial that another coordinator, or a person in the dashboard, has ended."""
        self.study.forget_running(running.number)
        if not self.ledger.coordination.is_shared:  # then no other coordinator retries it
            self._close(running, self.study.get_trials(deepcopy=False)[running.number])

    # -- trials that a worker refuses

    def accepted(self, running: RunningTrial) -> None:
        """Note that a worker has begun to train the trial.

        So the cause of suspects that were refused before lies in their own parameters.
        """
        if self.suspects and running.begun > self._begun:
            suspects, self.suspects = self.suspects, []
            for suspect, outcome in suspects:
                self._blame(suspect, outcome)
                self.duplicates.original_ended(suspect)

    def _refuse(self, running: RunningTrial, outcome: Outcome, begun: int) -> None:
        concerns_disk = outcome.exit_code == StorageError.code  # and so every trial
        known = outcome.problems in self._blamed or (
            running.refused and self._others_were_accepted()
        )
        if known and not concerns_disk:
            self._blame(running, outcome)
            return
        self.suspects.append((running, outcome))
        self._begun = begun
        limit_reached = len(self.suspects) == SUSPECTS
        if concerns_disk or limit_reached or self.error is not None or self.should_stop():
            self.end_suspicion()

    def _blame(self, running: RunningTrial, outcome: Outcome) -> None:
        self._blamed.add(outcome.problems)
        try:
            self._exclude(running, f"refused: {'; '.join(outcome.problems)}"[:500])
        except UpdateFinishedTrialError:
            self._lose(running)

    def end_suspicion(self) -> None:
        """End the search because of the suspects: no later trial was accepted."""
        suspects, self.suspects = self.suspects, []
        for suspect, outcome in suspects:
            self._ask_again(suspect, outcome)
            self.duplicates.original_ended(suspect)

    def _ask_again(self, running: RunningTrial, outcome: Outcome) -> None:
        """End the search. The next run retries the trial, when the cause is mended."""
        marks = {} if outcome.exit_code == StorageError.code else {REFUSED: True}
        reason = "; ".join(outcome.problems)[:500]
        self.ledger.retry_own(
            running.trial, running.proposal, reason, counts_as_attempt=False, marks=marks
        )
        self.error = self.error or to_tuner_error(outcome)

    def _others_were_accepted(self) -> bool:
        trials = self.study.get_trials(deepcopy=False, states=ENDED_STATES)
        return any(trial.intermediate_values for trial in trials)


def _record_fitted(trial: Trial, epoch: Epoch, temperature: str, thresholds: str) -> None:
    """Store what was fitted to the validation examples after an epoch, under these names."""
    if epoch.temperature is not None:
        trial.set_user_attr(temperature, epoch.temperature)
    if epoch.thresholds:
        trial.set_user_attr(thresholds, list(epoch.thresholds))

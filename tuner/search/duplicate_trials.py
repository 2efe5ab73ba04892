"""Trials with the parameters of another trial.

They are not trained: they get the result of the other trial.
"""

from collections.abc import Iterable

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from tuner.config.run import Run
from tuner.files.crash_points import crash_point
from tuner.search.history import DUPLICATE_OF, params_key
from tuner.search.ledger import Ledger
from tuner.search.running_trial import RunningTrial, SearchListener
from tuner.search.windowed_study import WindowedStudy


class DuplicateTrials:
    """The duplicates that wait for the result of a running trial: `followers`."""

    def __init__(self, study: WindowedStudy, ledger: Ledger, listener: SearchListener) -> None:
        self.study, self.ledger, self.listener = study, ledger, listener
        # by the number of the original trial: the duplicates with their proposals
        self.followers: dict[int, list[tuple[Trial, int]]] = {}

    def numbers(self) -> set[int]:
        """Return the numbers of the trials that wait for the result of another trial."""
        return {trial.number for waiting in self.followers.values() for trial, _ in waiting}

    def takes(self, trial: Trial, run: Run, proposal: int, running: Iterable[RunningTrial]) -> bool:
        """Take a trial if another trial has its parameters.

        Then the trial is not trained. It gets the other trial's result now or when that trial ends.

        Args:
            trial: A trial that was just asked for.
            run: The trial's run.
            proposal: The proposal that it carries out.
            running: The running trials of this coordinator.

        Returns:
            Whether the trial was taken.
        """
        key = params_key(trial.params)
        known = self.ledger.number_by_params.get(key)
        if known is not None:
            self._repeat(trial, run, known)
            return True
        original = next((candidate for candidate in running if candidate.params_key == key), None)
        if original is None:
            return False
        self.followers.setdefault(original.number, []).append((trial, proposal))
        return True

    def original_ended(self, original: RunningTrial) -> None:
        """End the followers of a trial as that trial ended. Without a result they are retried."""
        for trial, proposal in self.followers.pop(original.number, ()):
            known = self.ledger.number_by_params.get(original.params_key)
            if known is None:
                self.ledger.retry_own(
                    trial,
                    proposal,
                    "the trial with its parameters did not end",
                    counts_as_attempt=False,
                )
                continue
            try:
                self._repeat(trial, original.run, known)
            except UpdateFinishedTrialError:
                self.study.forget_running(trial.number)  # another process ended it

    def _repeat(self, trial: Trial, run: Run, number: int) -> None:
        """Give a trial the result of trial `number`, which ended with equal parameters."""
        original = self.study.get_trials(deepcopy=False)[number]
        trial.set_user_attr(DUPLICATE_OF, number)
        for step, value in sorted(original.intermediate_values.items()):
            trial.report(value, step)
        crash_point("search.repeating")
        values = original.values if original.state == TrialState.COMPLETE else None
        ended = self.study.tell(trial.number, values, original.state)
        self.ledger.enter_ended(ended)
        self.listener.on_trial_end(ended, run, None)

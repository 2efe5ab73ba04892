"""A study that shows a window of its trials to sampler and pruner, from memory.

So a proposal in a study of ten thousand trials costs what it costs in a study of hundreds.
"""

import bisect
import contextlib
import enum
from collections.abc import Container, Iterator, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.search.history import sign_of
from tuner.search.optuna_internals import HookedStudy, snapshot_of, trial_id_of
from tuner.search.projection_pruner import ProjectionPruner
from tuner.search.write_buffer import BufferedStorage, buffer_writes

MAX_BEST, MAX_LATEST, MAX_RUNNING = 100, 400, 100
VISIBLE_STATES = frozenset({TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING})

# the pruners that need nothing of a trial except what is in memory
FROM_MEMORY = (optuna.pruners.MedianPruner, ProjectionPruner, optuna.pruners.NopPruner)


class View(enum.Enum):
    """Who asks the study for its trials, and therefore which trials it must see.

    `ALL`: tuner itself asks. It sees all trials.

    `SAMPLING`: the sampler asks in `window()`, or a pruner of FROM_MEMORY.
      - For all states (None): one trial of each kind.
      - For completed, pruned or running trials: those of the window.
      - For other states: all trials with these states.

    `JUDGING`: another pruner asks in `should_prune`.
      - For all states (None): all trials except the failed ones.
      - For completed, pruned or running trials: those of the window.
      - For other states: all trials with these states, except the failed ones.

    One trial of each kind is enough for a sampler that asks for all trials: it looks for the
    parameters that all trials have in common. A pruner that asks for all trials (successive
    halving) compares the trial with all that it judged before. A failed attempt must not be among
    them, because it would compete with its retry.
    """

    ALL = enum.auto()
    SAMPLING = enum.auto()
    JUDGING = enum.auto()


class WindowedStudy(HookedStudy):
    """A study that shows only some of its trials inside `window()`.

    They are the latest 100 running trials, the latest 400 trials that ended and, of the earlier
    trials, the best 100 that completed. While a study has no more trials than that, the sampler
    proposes and the pruner decides as they would over the whole study.

    The window depends on the history alone. So a search that was killed and continued has the same
    window as one that was not interrupted.
    """

    def __init__(self, study: optuna.Study) -> None:
        super().__init__(study)
        self.view = View.ALL
        # one ended trial for each combination of distributions and final state
        self.one_of_each_kind: dict[Any, FrozenTrial] = {}
        self.running_trials: dict[int, Trial] = {}  # this coordinator's trials, by number
        # what `peek_enqueued` read for the coming `ask`; None: not known
        self.waiting_queue: list[FrozenTrial] | None = None
        self.write_buffers: dict[int, BufferedStorage] = {}  # by trial number
        self.best_ended: list[tuple[float, int, FrozenTrial]] = []  # by value, the worst first
        self.sign = sign_of(self.direction)
        self.latest_ended: list[FrozenTrial] = []
        self.running_elsewhere: list[FrozenTrial] = []  # the trials that other coordinators run
        self.seen_numbers: set[int] = set()  # of all trials that were ever in the window
        for trial in self.get_trials(deepcopy=False):
            self.add_ended(trial)

    @contextlib.contextmanager
    def _show(self, view: View) -> Iterator[None]:
        before, self.view = self.view, view
        try:
            yield
        finally:
            self.view = before

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        """Show only the window of trials while the block runs."""
        with self._show(View.SAMPLING):
            yield

    def ask(
        self, fixed_distributions: dict[str, optuna.distributions.BaseDistribution] | None = None
    ) -> Trial:
        trial = super().ask(fixed_distributions)
        self.running_trials[trial.number] = trial
        buffer = buffer_writes(self, trial)
        if buffer is not None:
            self.write_buffers[trial.number] = buffer
        return trial

    def peek_enqueued(self) -> FrozenTrial | None:
        """Return the enqueued trial that the next `ask` takes."""
        self.waiting_queue = self.waiting_trials()
        return self.waiting_queue[0] if self.waiting_queue else None

    def start_enqueued(self, trial: FrozenTrial) -> bool:
        """Set an enqueued trial to running. Return False if it does not wait any more."""
        return self.storage.set_trial_state_values(trial_id_of(self, trial), TrialState.RUNNING)

    def enqueue_trial(
        self,
        params: dict[str, Any],
        user_attrs: dict[str, Any] | None = None,
        skip_if_exists: bool = False,
    ) -> None:
        super().enqueue_trial(params, user_attrs, skip_if_exists)
        self.waiting_queue = None

    def none_waits(self) -> bool:
        queue, self.waiting_queue = self.waiting_queue, None
        return queue == []

    def flush_writes(self, trial: Trial, *, now: bool = False) -> None:
        """Write what a running trial reported, if it has waited for long, or if `now` is true."""
        buffer = self.write_buffers.get(trial.number)
        if buffer is not None and (now or buffer.is_due()):
            buffer.flush()

    def should_prune(self, trial: Trial) -> bool:
        """Return whether the pruner ends the trial."""
        snapshot = snapshot_of(trial)
        if snapshot is not None and isinstance(self.pruner, FROM_MEMORY):
            with self._show(View.SAMPLING):
                return self.pruner.prune(self, snapshot)
        self.flush_writes(trial, now=True)
        with self._show(View.JUDGING):
            return trial.should_prune()

    def tell(
        self,
        trial: Trial | int,
        values: float | Sequence[float] | None = None,
        state: TrialState | None = None,
        skip_if_finished: bool = False,
    ) -> FrozenTrial:
        """End a trial, as Optuna's `tell` does.

        Raises:
            UpdateFinishedTrialError: Another process has ended the trial. Optuna raises a
                ValueError for this.
        """
        number = trial if isinstance(trial, int) else trial.number
        buffer = self.write_buffers.pop(number, None)
        if buffer is not None:
            buffer.flush()
        try:
            ended = super().tell(trial, values, state, skip_if_finished)
        except ValueError:
            self._refuse_finished(number)
            raise
        self.running_trials.pop(ended.number, None)
        self.add_ended(ended)
        return ended

    def _refuse_finished(self, number: int) -> None:
        """Raise UpdateFinishedTrialError if the trial has ended."""
        state = self.storage.get_trial(trial_id_of(self, number)).state
        if state.is_finished():
            raise UpdateFinishedTrialError(f"trial {number} has ended: {state.name}")

    def forget_running(self, number: int) -> None:
        """Drop a trial that another process ended, with the reports that were not written."""
        self.running_trials.pop(number, None)
        self.write_buffers.pop(number, None)

    def add_ended(self, trial: FrozenTrial) -> None:
        """Take a trial that has ended into the window, once. Any coordinator may have ended it."""
        ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        if not ended or trial.number in self.seen_numbers:
            return
        self.seen_numbers.add(trial.number)
        kind = (trial.state, frozenset(trial.distributions.items()))
        self.one_of_each_kind.setdefault(kind, trial)
        self.latest_ended.append(trial)
        if len(self.latest_ended) > MAX_LATEST:
            oldest = self.latest_ended.pop(0)
            if oldest.state == TrialState.COMPLETE:
                value = self.sign * float(oldest.value or 0.0)
                bisect.insort(self.best_ended, (value, -oldest.number, oldest))
                del self.best_ended[:-MAX_BEST]

    def visible_trials(self, states: Container[TrialState] | None) -> list[FrozenTrial] | None:
        """Return the trials that the caller sees, by the table of `View`. None: all trials."""
        if self.view is View.ALL:
            return None
        if states is not None and not any(s in states for s in set(TrialState) - VISIBLE_STATES):
            return self._window_of(states)
        if self.view is View.JUDGING:
            return self._all_except_failed(states)
        return list(self.one_of_each_kind.values()) if states is None else None

    def _window_of(self, states: Container[TrialState]) -> list[FrozenTrial] | None:
        """Return the trials of the window with these states. None: they must be read."""
        trials = [*(trial for _, _, trial in self.best_ended), *self.latest_ended]
        if TrialState.RUNNING in states:
            running = self._running()
            if running is None:
                return None
            trials += running[-MAX_RUNNING:]  # each of them makes TPE's next proposal dearer
        return sorted((t for t in trials if t.state in states), key=lambda t: t.number)

    def _all_except_failed(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False, states=states)
        return [trial for trial in trials if trial.state != TrialState.FAIL]

    def _running(self) -> list[FrozenTrial] | None:
        """Return all running trials by number. None: they must be read from the storage."""
        running = [*self.running_elsewhere]
        for trial in self.running_trials.values():
            snapshot = snapshot_of(trial)
            if snapshot is None:
                return None
            running.append(snapshot)
        return sorted(running, key=lambda trial: trial.number)

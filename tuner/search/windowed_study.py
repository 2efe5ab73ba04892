"""A study that shows its sampler and pruner a window of its trials, from memory: ten thousand trials cost what hundreds do."""

import bisect
import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.search.optuna_internals import HookedStudy, snapshot_of, trial_id_of
from tuner.search.projection_pruner import ProjectionPruner
from tuner.search.write_buffer import BufferedStorage, buffer_writes

MAX_BEST, MAX_LATEST, MAX_RUNNING = 100, 400, 100
VISIBLE_STATES = frozenset({TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING})

# pruners that ask nothing of a trial but what is in memory
FROM_MEMORY = (optuna.pruners.MedianPruner, ProjectionPruner, optuna.pruners.NopPruner)


class WindowedStudy(HookedStudy):
    """Inside `window()` only these trials are there: the latest 100 that run, the latest 400 that ended and, of the earlier ones,
    the best 100 that completed. While there are no more, a sampler proposes and a pruner decides as over the whole study.

    The window follows from the history, so that a search that was killed and continued has the same.
    """

    def __init__(self, study: optuna.Study) -> None:
        super().__init__(study)
        self.window_active = self.pruning_active = False
        self.one_of_each_kind: dict[
            Any, FrozenTrial
        ] = {}  # of those that ended, one for each set of parameters and how it ended
        self.running_trials: dict[int, Trial] = {}  # by number
        self.waiting_queue: list[FrozenTrial] | None = (
            None  # what `peek_enqueued` read for the coming ask
        )
        self.write_buffers: dict[int, BufferedStorage] = {}  # by trial number
        self.best_ended: list[tuple[float, int, FrozenTrial]] = []  # by value, the worst first
        self.latest_ended: list[FrozenTrial] = []
        self.running_elsewhere: list[FrozenTrial] = []  # what other coordinators run
        self.seen_numbers: set[int] = set()  # the numbers of all that were ever in the window
        for trial in self.get_trials(deepcopy=False):
            self.add_ended(trial)

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        self.window_active = True
        try:
            yield
        finally:
            self.window_active = False

    def ask(
        self, fixed_distributions: dict[str, optuna.distributions.BaseDistribution] | None = None
    ) -> Trial:
        trial = super().ask(fixed_distributions)
        self.running_trials[trial.number] = trial
        collected = buffer_writes(self, trial)
        if collected is not None:
            self.write_buffers[trial.number] = collected
        return trial

    def peek_enqueued(self) -> FrozenTrial | None:
        """The enqueued trial that the next `ask` takes."""
        self.waiting_queue = self.waiting_trials()
        return self.waiting_queue[0] if self.waiting_queue else None

    def start_enqueued(self, trial: FrozenTrial) -> bool:
        """Has an enqueued trial run; False: it is not waiting any more."""
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
        none, self.waiting_queue = self.waiting_queue == [], None
        return none

    def flush_writes(self, trial: Trial, *, now: bool = False) -> None:
        """Writes what a running trial has told, if it waits for long, or `now`."""
        collected = self.write_buffers.get(trial.number)
        if collected is not None and (now or collected.is_due()):
            collected.flush()

    def should_prune(self, trial: Trial) -> bool:
        """Whether the pruner ends the trial."""
        with self.window():
            snapshot = snapshot_of(trial)
            if snapshot is not None and isinstance(self.pruner, FROM_MEMORY):
                return self.pruner.prune(self, snapshot)
            self.flush_writes(trial, now=True)
            self.pruning_active = True
            try:
                return trial.should_prune()
            finally:
                self.pruning_active = False

    def tell(
        self,
        trial: Trial | int,
        values: float | Sequence[float] | None = None,
        state: TrialState | None = None,
        skip_if_finished: bool = False,
    ) -> FrozenTrial:
        """As Optuna's. Raises UpdateFinishedTrialError where somebody else has ended the trial, Optuna a ValueError."""
        number = trial if isinstance(trial, int) else trial.number
        collected = self.write_buffers.pop(number, None)
        if collected is not None:
            collected.flush()
        try:
            found = super().tell(trial, values, state, skip_if_finished)
        except ValueError:
            self._refuse_finished(number)
            raise
        self.running_trials.pop(found.number, None)
        self.add_ended(found)
        return found

    def _refuse_finished(self, number: int) -> None:
        """Raises UpdateFinishedTrialError where the trial has ended."""
        state = self.storage.get_trial(trial_id_of(self, number)).state
        if state.is_finished():
            raise UpdateFinishedTrialError(f"trial {number} has ended: {state.name}")

    def forget_running(self, number: int) -> None:
        """Somebody else ended this trial; what it told and was not written is dropped."""
        self.running_trials.pop(number, None)
        self.write_buffers.pop(number, None)

    def add_ended(self, trial: FrozenTrial) -> None:
        """Takes a trial that has ended, here or elsewhere, into the window; once."""
        if trial.number in self.seen_numbers or trial.state not in (
            TrialState.COMPLETE,
            TrialState.PRUNED,
        ):
            return
        self.seen_numbers.add(trial.number)
        self.one_of_each_kind.setdefault(
            (trial.state, frozenset(trial.distributions.items())), trial
        )
        self.latest_ended.append(trial)
        if len(self.latest_ended) > MAX_LATEST:
            old = self.latest_ended.pop(0)
            if old.state == TrialState.COMPLETE:
                bisect.insort(self.best_ended, (float(old.value or 0.0), -old.number, old))
                del self.best_ended[:-MAX_BEST]

    def visible_trials(self, states: Container[TrialState] | None) -> list[FrozenTrial] | None:
        """None, which means all, outside of `window()` and where others than these are asked for."""
        if not self.window_active:
            return None
        if states is None and not self.pruning_active:
            # A sampler looks for the parameters that all trials have: the same of one trial of each kind.
            return list(self.one_of_each_kind.values())
        if states is None or any(state in states for state in set(TrialState) - VISIBLE_STATES):
            return self._judged(states) if self.pruning_active else None
        visible = [*(trial for _, _, trial in self.best_ended), *self.latest_ended]
        if TrialState.RUNNING in states:
            underway = self._underway()
            if underway is None:
                return None
            visible += underway[-MAX_RUNNING:]  # each makes TPE's next proposal dearer
        return sorted(
            (trial for trial in visible if trial.state in states), key=lambda trial: trial.number
        )

    def _judged(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """Successive halving compares with all that were judged: a lost attempt would compete with its retry."""
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False, states=states)
        return [trial for trial in trials if trial.state != TrialState.FAIL]

    def _underway(self) -> list[FrozenTrial] | None:
        """All running trials, by number; None where they must be read from the storage."""
        underway = [*self.running_elsewhere]
        for trial in self.running_trials.values():
            snapshot = snapshot_of(trial)
            if snapshot is None:
                return None
            underway.append(snapshot)
        return sorted(underway, key=lambda trial: trial.number)

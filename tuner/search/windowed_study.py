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
from tuner.search.write_buffer import Batched, batch

BEST, LATEST, UNDERWAY = 100, 400, 100
SEEN = frozenset({TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING})

# pruners that ask nothing of a trial but what is in memory
FROM_MEMORY = (optuna.pruners.MedianPruner, ProjectionPruner, optuna.pruners.NopPruner)


class WindowedStudy(HookedStudy):
    """Inside `window()` only these trials are there: the latest 100 that run, the latest 400 that ended and, of the earlier ones,
    the best 100 that completed. While there are no more, a sampler proposes and a pruner decides as over the whole study.

    The window follows from the history, so that a search that was killed and continued has the same.
    """

    def __init__(self, study: optuna.Study) -> None:
        super().__init__(study)
        self.narrow = self.judging = False
        self.kinds: dict[
            Any, FrozenTrial
        ] = {}  # of those that ended, one for each set of parameters and how it ended
        self.running: dict[int, Trial] = {}  # by number
        self.waiting: list[FrozenTrial] | None = (
            None  # what `next_waiting` found for the coming ask
        )
        self.batches: dict[int, Batched] = {}  # by trial number
        self.best: list[tuple[float, int, FrozenTrial]] = []  # by value, the worst first
        self.latest: list[FrozenTrial] = []
        self.elsewhere: list[FrozenTrial] = []  # what other coordinators run
        self.known: set[int] = set()  # the numbers of all that were ever in the window
        for trial in self.get_trials(deepcopy=False):
            self.keep(trial)

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        self.narrow = True
        try:
            yield
        finally:
            self.narrow = False

    def ask(
        self, fixed_distributions: dict[str, optuna.distributions.BaseDistribution] | None = None
    ) -> Trial:
        trial = super().ask(fixed_distributions)
        self.running[trial.number] = trial
        collected = batch(self, trial)
        if collected is not None:
            self.batches[trial.number] = collected
        return trial

    def next_waiting(self) -> FrozenTrial | None:
        """The enqueued trial that the next `ask` takes."""
        self.waiting = self.waiting_trials()
        return self.waiting[0] if self.waiting else None

    def take(self, trial: FrozenTrial) -> bool:
        """Has an enqueued trial run; False: it is not waiting any more."""
        return self.storage.set_trial_state_values(trial_id_of(self, trial), TrialState.RUNNING)

    def enqueue_trial(
        self,
        params: dict[str, Any],
        user_attrs: dict[str, Any] | None = None,
        skip_if_exists: bool = False,
    ) -> None:
        super().enqueue_trial(params, user_attrs, skip_if_exists)
        self.waiting = None

    def none_waits(self) -> bool:
        none, self.waiting = self.waiting == [], None
        return none

    def write(self, trial: Trial, *, now: bool = False) -> None:
        """Writes what a running trial has told, if it waits for long, or `now`."""
        collected = self.batches.get(trial.number)
        if collected is not None and (now or collected.due()):
            collected.flush()

    def prunes(self, trial: Trial) -> bool:
        """Whether the pruner ends the trial."""
        with self.window():
            snapshot = snapshot_of(trial)
            if snapshot is not None and isinstance(self.pruner, FROM_MEMORY):
                return self.pruner.prune(self, snapshot)
            self.write(trial, now=True)
            self.judging = True
            try:
                return trial.should_prune()
            finally:
                self.judging = False

    def tell(
        self,
        trial: Trial | int,
        values: float | Sequence[float] | None = None,
        state: TrialState | None = None,
        skip_if_finished: bool = False,
    ) -> FrozenTrial:
        """As Optuna's. Raises UpdateFinishedTrialError where somebody else has ended the trial, Optuna a ValueError."""
        number = trial if isinstance(trial, int) else trial.number
        collected = self.batches.pop(number, None)
        if collected is not None:
            collected.flush()
        try:
            found = super().tell(trial, values, state, skip_if_finished)
        except ValueError:
            self._refuse_finished(number)
            raise
        self.running.pop(found.number, None)
        self.keep(found)
        return found

    def _refuse_finished(self, number: int) -> None:
        """Raises UpdateFinishedTrialError where the trial has ended."""
        state = self.storage.get_trial(trial_id_of(self, number)).state
        if state.is_finished():
            raise UpdateFinishedTrialError(f"trial {number} has ended: {state.name}")

    def lose(self, number: int) -> None:
        """Somebody else ended this trial; what it told and was not written is dropped."""
        self.running.pop(number, None)
        self.batches.pop(number, None)

    def keep(self, trial: FrozenTrial) -> None:
        """Takes a trial that has ended, here or elsewhere, into the window; once."""
        if trial.number in self.known or trial.state not in (
            TrialState.COMPLETE,
            TrialState.PRUNED,
        ):
            return
        self.known.add(trial.number)
        self.kinds.setdefault((trial.state, frozenset(trial.distributions.items())), trial)
        self.latest.append(trial)
        if len(self.latest) > LATEST:
            old = self.latest.pop(0)
            if old.state == TrialState.COMPLETE:
                bisect.insort(self.best, (float(old.value or 0.0), -old.number, old))
                del self.best[:-BEST]

    def visible_trials(self, states: Container[TrialState] | None) -> list[FrozenTrial] | None:
        """None, which means all, outside of `window()` and where others than these are asked for."""
        if not self.narrow:
            return None
        if states is None and not self.judging:
            # A sampler looks for the parameters that all trials have: the same of one trial of each kind.
            return list(self.kinds.values())
        if states is None or any(state in states for state in set(TrialState) - SEEN):
            return self._judged(states) if self.judging else None
        visible = [*(trial for _, _, trial in self.best), *self.latest]
        if TrialState.RUNNING in states:
            underway = self._underway()
            if underway is None:
                return None
            visible += underway[-UNDERWAY:]  # each makes TPE's next proposal dearer
        return sorted(
            (trial for trial in visible if trial.state in states), key=lambda trial: trial.number
        )

    def _judged(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """Successive halving compares with all that were judged: a lost attempt would compete with its retry."""
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False, states=states)
        return [trial for trial in trials if trial.state != TrialState.FAIL]

    def _underway(self) -> list[FrozenTrial] | None:
        """All running trials, by number; None where they must be read from the storage."""
        underway = [*self.elsewhere]
        for trial in self.running.values():
            snapshot = snapshot_of(trial)
            if snapshot is None:
                return None
            underway.append(snapshot)
        return sorted(underway, key=lambda trial: trial.number)

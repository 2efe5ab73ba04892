"""What is recorded when a trial's job has ended, whether the trial is tried again, and when the search ends for it."""

from collections.abc import Callable

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from tuner.config.run import Search
from tuner.errors import StorageError, TunerError
from tuner.files.checkpoint_files import Keeping
from tuner.files.crash_points import crash
from tuner.jobs import Outcome, refusal
from tuner.messages import Result
from tuner.search import history
from tuner.search.duplicate_trials import DuplicateTrials
from tuner.search.failures import Failures
from tuner.search.history import BEST_EPOCH, FINAL, KILLED, REASON, REFUSED, SCORES, TRACE, rank
from tuner.search.ledger import ENDED, Ledger
from tuner.search.running_trial import Listener, RunningTrial
from tuner.search.windowed_study import WindowedStudy

SUSPECTS = 3  # trials refused in a row that end the search
PARTS = 4  # of its batches, in which a trial makes its last attempt when a memory limit ended all others


class TrialOutcomes:
    """`error` ends the search: no further trial is begun.

    A trial may be refused for a reason that concerns every trial (the data are gone), or for one that lies in its own
    parameters. So the search goes on after a refusal, and that trial stays open as one of the `suspects`. When a trial
    that was begun later is accepted, the suspects have themselves to blame, and are pruned. When others are refused
    too, or there is none to compare with, the search ends, and the suspects are asked for again by the next run.
    """

    def __init__(
        self,
        study: WindowedStudy,
        search: Search,
        ledger: Ledger,
        duplicates: DuplicateTrials,
        keeping: Keeping,
        listener: Listener,
        stopping: Callable[[], bool],
    ) -> None:
        self.study, self.search, self.ledger, self.duplicates = study, search, ledger, duplicates
        self.keeping, self.listener, self.stopping = keeping, listener, stopping
        self.failures = Failures()
        self.error: TunerError | None = None
        self.suspects: list[tuple[RunningTrial, Outcome]] = []
        self._begun = 0  # how many trials this process had begun when the last suspect was refused
        self._blamed: set[tuple[str, ...]] = set()  # problems that lie in a trial's own parameters

    def suspected(self) -> dict[int, RunningTrial]:
        """The suspects by number."""
        return {running.number: running for running, _ in self.suspects}

    def parts(self, running: RunningTrial) -> int:
        """In how many parts a trial takes its batches: several in the last attempt, if a memory limit ended each other one."""
        last = 1 < running.attempt == self.search.retries + 1
        return PARTS if last and running.killed == running.attempt - 1 else 1

    def record(self, running: RunningTrial, outcome: Outcome, begun: int) -> None:
        """Records how a trial's job ended. `begun`: how many trials this process has begun."""
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
        elif outcome.reason == "interrupted" or (outcome.kind == "lost" and self.stopping()):
            self.ledger.again(running.trial, running.proposal, "interrupted", count=False)
        elif outcome.kind == "lost":
            self._lost_worker(running, outcome)
        else:
            self._give_up(running, outcome)

    def _finish(self, running: RunningTrial, result: Result) -> None:
        trial = running.trial
        if result.state == "stopped" and not running.pruned:
            self.ledger.again(running.trial, running.proposal, "interrupted", count=False)
            return
        failed = result.state in ("diverged", "oom")
        trial.set_user_attr("seconds", round(result.seconds, 3))
        if result.best:
            trial.set_user_attr(BEST_EPOCH, result.best)
            trial.set_user_attr(SCORES, result.epochs[result.best - 1].scores)
        if failed:
            trial.set_user_attr(REASON, f"{result.state}: {result.reason}")
        self.listener.files(
            trial, running.run, result
        )  # artifacts can be attached only while a trial is running
        crash("search.files")
        if result.state == "complete":
            value = result.epochs[result.best - 1].scores[str(self.search.metric)]
            ended = self.study.tell(running.number, value)
        else:
            ended = self.study.tell(running.number, state=TrialState.PRUNED)
        crash("search.told")
        self._close(running, ended, result)
        self.accepted(running)
        if failed:
            self._count_failure(f"{result.state}: {result.reason}", alike=False)
        else:
            self.failures.clear()

    def _close(
        self, running: RunningTrial, ended: FrozenTrial, result: Result | None = None
    ) -> None:
        self.keeping.ended(running.proposal, rank(ended))
        self.ledger.close(ended)
        self.listener.ended(ended, running.run, result)

    def _lost_worker(self, running: RunningTrial, outcome: Outcome) -> None:
        """Asks for the trial again, or gives it up after its last attempt."""
        killed = running.killed + (outcome.cause == "memory")
        if running.attempt <= self.search.retries:
            marks = {KILLED: killed} if killed else {}
            self.ledger.again(
                running.trial, running.proposal, outcome.reason, count=True, marks=marks
            )
        elif killed == running.attempt:
            times = f", in each of {killed} attempts" if killed > 1 else ""
            self._exclude(running, f"oom: {outcome.reason}{times}")
        else:
            self._give_up(running, outcome)

    def _exclude(self, running: RunningTrial, reason: str) -> None:
        """Ends a trial whose parameters are to blame. Pruned and not failed, so that the sampler learns to stay away from them."""
        running.trial.set_user_attr(REASON, reason)
        self._close(running, self.study.tell(running.number, state=TrialState.PRUNED))
        self._count_failure(reason, alike=False)

    def _give_up(self, running: RunningTrial, outcome: Outcome) -> None:
        """Fails a trial for good: its code raised, or its worker died at the last attempt."""
        running.trial.set_user_attr(FINAL, True)
        if outcome.trace:
            running.trial.set_user_attr(TRACE, outcome.trace[-4000:])
        self.ledger.fail(running.number, outcome.reason)
        self._close(running, self.study.get_trials(deepcopy=False)[running.number])
        self._count_failure(outcome.reason, alike=True)

    def _count_failure(self, reason: str, *, alike: bool) -> None:
        completed = bool(history.completed(self.study))
        self.error = self.failures.add(reason, alike=alike, completed=completed) or self.error

    def _lose(self, running: RunningTrial) -> None:
        """Somebody else has ended the trial: another coordinator, or a person in the dashboard."""
        self.study.lose(running.number)
        if not self.ledger.leases.shared:  # then nobody else tries it again
            self._close(running, self.study.get_trials(deepcopy=False)[running.number])

    # -- trials that a worker refuses

    def accepted(self, running: RunningTrial) -> None:
        """A worker has begun to train the trial. So the suspects that were refused before that have themselves to blame."""
        if self.suspects and running.begun > self._begun:
            suspects, self.suspects = self.suspects, []
            for suspect, outcome in suspects:
                self._blame(suspect, outcome)
                self.duplicates.original_ended(suspect)

    def _refuse(self, running: RunningTrial, outcome: Outcome, begun: int) -> None:
        disk = outcome.code == StorageError.code  # concerns every trial
        known = outcome.problems in self._blamed or (
            running.refused and self._others_were_accepted()
        )
        if known and not disk:
            self._blame(running, outcome)
            return
        self.suspects.append((running, outcome))
        self._begun = begun
        if disk or len(self.suspects) == SUSPECTS or self.error is not None or self.stopping():
            self.end_suspicion()

    def _blame(self, running: RunningTrial, outcome: Outcome) -> None:
        self._blamed.add(outcome.problems)
        try:
            self._exclude(running, f"refused: {'; '.join(outcome.problems)}"[:500])
        except UpdateFinishedTrialError:
            self._lose(running)

    def end_suspicion(self) -> None:
        """Ends the search because of the suspects: no trial begun after them has shown that others are accepted."""
        suspects, self.suspects = self.suspects, []
        for suspect, outcome in suspects:
            self._ask_again(suspect, outcome)
            self.duplicates.original_ended(suspect)

    def _ask_again(self, running: RunningTrial, outcome: Outcome) -> None:
        """Ends the search. The trial is asked for again by the next run, when the cause is mended."""
        marks = {} if outcome.code == StorageError.code else {REFUSED: True}
        reason = "; ".join(outcome.problems)[:500]
        self.ledger.again(running.trial, running.proposal, reason, count=False, marks=marks)
        self.error = self.error or refusal(outcome)

    def _others_were_accepted(self) -> bool:
        trials = self.study.get_trials(deepcopy=False, states=ENDED)
        return any(trial.intermediate_values for trial in trials)

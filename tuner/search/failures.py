"""When a search that goes nowhere stops: failures that are alike, or many and nothing else."""

from collections import Counter

from tuner.errors import NoUsableTrial

MAX_SAME_CAUSE, MAX_FAILURES = 3, 10


class FailureLimits:
    """The reasons of this process's failed trials, since the last that its worker brought to a healthy end."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def record(self, reason: str, *, same_cause: bool, any_completed: bool) -> NoUsableTrial | None:
        """The end of the search: `alike` ones, 3 in a row, or 10 of any kind where no trial has `completed`. None: it goes on."""
        self.reasons.append(reason)
        same = self.reasons[-MAX_SAME_CAUSE:]
        if same_cause and len(same) == MAX_SAME_CAUSE and len(set(same)) == 1:
            return NoUsableTrial(
                f"the last {MAX_SAME_CAUSE} trials failed alike: {reason}; nothing finished is lost, mend this and run the same command"
            )
        if len(self.reasons) >= MAX_FAILURES and not any_completed:
            counts = ", ".join(f"{n} x {r}" for r, n in Counter(self.reasons).most_common(3))
            return NoUsableTrial(
                f"{len(self.reasons)} trials failed and none completed; first: {self.reasons[0]}; in all: {counts}"
            )
        return None

    def clear(self) -> None:
        """A trial completed, or was pruned for its scores: whatever failed before was no general fault."""
        self.reasons.clear()

"""When a search stops because its trials fail: alike, or many and none completed."""

from collections import Counter

from tuner.errors import NoUsableTrial

MAX_SAME_CAUSE, MAX_FAILURES = 3, 10


class FailureLimits:
    """The reasons why trials of this process failed, since the last trial that ended well."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def record(self, reason: str, *, same_cause: bool, any_completed: bool) -> NoUsableTrial | None:
        """Record a failure and decide whether it ends the search.

        The search ends after 3 failures in a row with the same reason, or after 10 failures of any
        kind where no trial has completed.

        Args:
            reason: Why the trial failed.
            same_cause: Whether equal reasons mean one cause that further trials would meet too.
            any_completed: Whether any trial of the study has completed.

        Returns:
            The error that ends the search, or None: the search goes on.
        """
        self.reasons.append(reason)
        latest = self.reasons[-MAX_SAME_CAUSE:]
        if same_cause and len(latest) == MAX_SAME_CAUSE and len(set(latest)) == 1:
            return NoUsableTrial(
                f"the last {MAX_SAME_CAUSE} trials failed alike: {reason}; nothing finished is "
                "lost, mend this and run the same command"
            )
        if len(self.reasons) >= MAX_FAILURES and not any_completed:
            counts = ", ".join(f"{n} x {r}" for r, n in Counter(self.reasons).most_common(3))
            return NoUsableTrial(
                f"{len(self.reasons)} trials failed and none completed; "
                f"first: {self.reasons[0]}; in all: {counts}"
            )
        return None

    def clear(self) -> None:
        """Forget the failures: a trial completed, or the pruner ended it for its scores.

        So the earlier failures had no cause that concerns every trial.
        """
        self.reasons.clear()

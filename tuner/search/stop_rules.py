"""`search.stop` and `search.target`: what ends a search before its budget is spent.

Both follow from the trials that have ended, so a search that was killed and continued ends where it
would have ended.
"""

import optuna

from tuner.config.run import SearchSettings
from tuner.search import history

DUPLICATES_IN_A_ROW = 50  # trials; then a search without a budget of trials has tried all there is


def reason_to_stop(study: optuna.Study, search: SearchSettings) -> str | None:
    """Return why the search ends before its budget is spent, as a note; None: it goes on."""
    if search.target is None and search.stop is None:
        return None
    sign = history.sign_of(study.direction)
    # by proposal, since a retry has another number than its first attempt
    ended = sorted(history.ended_proposals(study).items())
    # a rank begins with the negative value, and 0.0 - x has no negative zero
    values = [None if rank is None else 0.0 - rank[0] for _, rank in ended]
    best = max((value for value in values if value is not None), default=None)
    if best is None:
        return None
    if search.target is not None and best >= sign * search.target:
        return f"{sign * best:.4f} reaches the target {search.target:g} (search.target)"
    own_count = sum(number >= 0 for number, _ in ended)  # those of other studies come first
    if search.stop is None or own_count < search.stop.trials or len(values) <= search.stop.trials:
        return None
    before = max(
        (value for value in values[: -search.stop.trials] if value is not None), default=None
    )
    if before is None or best - before > search.stop.gain:
        return None
    return (
        f"the best improved by {best - before:.4g} in the last {search.stop.trials} trials, which "
        f"is no more than {search.stop.gain:g} (search.stop)"
    )

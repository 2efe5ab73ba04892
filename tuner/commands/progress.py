"""How far a search is, as a value: what the console and the summary know of the coordinator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The counts of a search at one moment. `running`: the numbers of the running trials."""

    budget_used: int
    budget: int
    running: frozenset[int] = frozenset()

"""How far a search is, as a value: what the console and the summary know of the coordinator."""

from dataclasses import dataclass

from tuner.config.search_settings import AS_MANY_AS_FIT


@dataclass(frozen=True)
class Progress:
    """The counts of a search at one moment.

    `running`: the numbers of the running trials. `seconds_left`: until the command ends; None: not
    known. `is_whole`: the budget is all that can be tried, such as a whole grid.
    """

    budget_used: int
    budget: int
    running: frozenset[int] = frozenset()
    seconds_left: float | None = None
    is_whole: bool = False

    @property
    def is_open(self) -> bool:
        """Whether the time alone is the budget, so that there is no number of trials."""
        return self.budget == AS_MANY_AS_FIT

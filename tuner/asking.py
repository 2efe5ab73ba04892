"""Which parameters are tried next: what a study begins with, and what its sampler proposes after that."""

from optuna.trial import Trial

from tuner.history import DEFAULT, ROOT, key_of
from tuner.pricing import STARTUP, Prices
from tuner.samplers import SAMPLERS, Ask, mix
from tuner.space import Space
from tuner.window import WindowedStudy


class Asker:
    """Draws are counted from 0; each depends on the seed, on which draw it is, and on the trials before it."""

    def __init__(self, study: WindowedStudy, space: Space, prices: Prices | None) -> None:
        """`prices`: ask for cheap trials first, and weigh the price of the others."""
        self.study, self.space, self.prices, self.search = study, space, prices, space.settings.search

    def budget(self) -> int:
        if not self.space.dimensions:
            return 1
        if self.search.sampler == "grid":
            return min(self.search.trials, len({key_of(p) for p in [self.space.default(), *self.space.grid()]}))
        return self.search.trials

    def default_draw(self) -> int:
        """Which draw the default recipe is: the first, or, where prices count, the one after the cheap ones."""
        return min(STARTUP, self.budget() - 1) if self.prices else 0

    def begin(self) -> None:
        """Enqueues what a new study tries first."""
        default = self.space.default()
        first = self.prices.cheapest(default) if self.prices and self.default_draw() else default
        self.study.enqueue_trial(first, user_attrs={DEFAULT: first == default})

    def ask(self, draw: int) -> Trial | None:
        """A trial of the study; one that waits goes before draw number `draw`. None: the grid is exhausted."""
        waiting = self.study.next_waiting()
        if not waiting and self.search.sampler == "grid":
            asked = {key_of(t.params) for t in self.study.get_trials(deepcopy=False)}
            point = next((p for p in self.space.grid() if key_of(p) not in asked), None)
            if point is None:
                return None
            self.study.enqueue_trial(point)
        elif not waiting and draw == self.default_draw() > 0:
            self.study.enqueue_trial(self.space.default(), user_attrs={DEFAULT: True})
        # a retry draws what its first attempt drew, or would have drawn had it lived to draw everything
        draw = int(waiting.user_attrs.get(ROOT, draw)) if waiting else draw
        self.study.sampler = SAMPLERS[self.search.sampler](Ask(mix(self.search.seed, draw), self.prices, draw / self.budget()))
        with self.study.window():
            return self.study.ask()

"""Which parameters are tried next: what a study begins with, and what its sampler proposes after that."""

import functools
import random
from typing import Any

from optuna.trial import Trial

from tuner.config.space import Dimension, Space
from tuner.search import history
from tuner.search.history import DEFAULT, ROOT, key_of
from tuner.search.samplers import SAMPLERS, mix
from tuner.search.windowed_study import WindowedStudy

EPOCHS, DEPTH = ("recipe", "epochs"), ("recipe", "freeze_depth")


class Asker:
    """Draws are counted from 0; each depends on the seed, on which draw it is, and on the trials before it.

    The first is the cheap truth, what the pretrained features give with a head alone; the second the default recipe. Then the
    sampler proposes.
    """

    def __init__(self, study: WindowedStudy, space: Space) -> None:
        self.study, self.space, self.search = study, space, space.settings.search
        self.cheap = self._cheap()

    def budget(self) -> int:
        if not self.space.dimensions:
            return 1
        if self.search.sampler == "grid":
            return min(self.search.trials, len(self.grid))
        return self.search.trials

    @functools.cached_property
    def grid(self) -> dict[str, dict[str, Any]]:
        """Every combination of the space by its key, in the order in which they are tried: drawn by the seed, so that
        the first ones, which a budget or a time limit leaves over, lie everywhere and not in one corner."""
        default = self.space.default()
        points = {key_of(point): point for point in [default, *self.space.grid()]}
        keys = sorted(points)
        random.Random(self.search.seed).shuffle(keys)
        return {key: points[key] for key in keys}

    def warning(self) -> str | None:
        """What there is to say about a budget that does not try all that the file asks for."""
        trials = self.search.trials
        if self.search.sampler != "grid" or not self.space.dimensions or trials >= len(self.grid):
            return None
        return (
            f"search.trials: the grid has {len(self.grid):,} combinations, of which {trials:,} are tried, drawn by search.seed; "
            f"for all of them set search.trials to {len(self.grid)}"
        )

    def _cheap(self) -> dict[str, Any] | None:
        """The default recipe frozen as deep as the space has it, for as few epochs. None where that says nothing: the head would not
        begin as a probe of pretrained features, or there is no depth to choose."""
        default = self.space.default()
        run = self.space.run({})
        ends = {
            d.name: _end(d, highest=d.path == DEPTH)
            for d in self.space.dimensions
            if d.path in (DEPTH, EPOCHS) and d.name in default
        }
        probed = run.recipe.head == "probe" and run.model.options.get("weights") != "none"
        first = default | ends
        wanted = (
            probed
            and "freeze_depth" in ends
            and first != default
            and self.budget() > 1
            and self.search.sampler != "grid"
        )
        return first if wanted else None

    def begin(self) -> None:
        """Enqueues what a new study tries first."""
        if self.cheap:
            self.study.enqueue_trial(self.cheap)
        else:
            self.study.enqueue_trial(self.space.default(), user_attrs={DEFAULT: True})

    def _marked(self) -> bool:
        """Whether the default recipe has been asked for; in a study that began with a budget of one trial it came first."""
        return any(t.user_attrs.get(DEFAULT) for t in self.study.get_trials(deepcopy=False))

    def ask(self, draw: int) -> Trial | None:
        """A trial of the study; one that waits goes before draw number `draw`. None: the grid is exhausted."""
        waiting = self.study.next_waiting()
        if not waiting and self.search.sampler == "grid":
            asked = {key_of(history.asked(t)) for t in self.study.get_trials(deepcopy=False)}
            point = next((p for key, p in self.grid.items() if key not in asked), None)
            if point is None:
                return None
            self.study.enqueue_trial(point)
        elif not waiting and self.cheap and draw == 1 and not self._marked():
            self.study.enqueue_trial(self.space.default(), user_attrs={DEFAULT: True})
        # a retry draws what its first attempt drew, or would have drawn had it lived to draw everything
        draw = int(waiting.user_attrs.get(ROOT, draw)) if waiting else draw
        self.study.sampler = SAMPLERS[self.search.sampler](mix(self.search.seed, draw))
        with self.study.window():
            return self.study.ask()


def _end(dimension: Dimension, *, highest: bool) -> int:
    leaf = dimension.leaf
    members = leaf.members() or (int(leaf.low), int(leaf.last))  # type: ignore[union-attr]
    return int(max(members) if highest else min(members))

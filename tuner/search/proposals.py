"""Which parameters are tried next: what a study begins with, and what its sampler proposes after that."""

import functools
import random
from typing import Any

from optuna.trial import Trial

from tuner.config.space import Space
from tuner.search import history
from tuner.search.history import IS_DEFAULT_RECIPE, PROPOSAL, params_key
from tuner.search.samplers import SAMPLERS, derive_seed
from tuner.search.windowed_study import WindowedStudy

EPOCHS_PATH, FREEZE_DEPTH_PATH = ("recipe", "epochs"), ("recipe", "freeze_depth")


class TrialProposer:
    """Draws are counted from 0; each depends on the seed, on which draw it is, and on the trials before it.

    The first is the cheap truth, what the pretrained features give with a head alone; the second the default recipe. Then the
    sampler proposes.
    """

    def __init__(self, study: WindowedStudy, space: Space) -> None:
        self.study, self.space, self.search_settings = study, space, space.settings.search
        self.linear_probe_params = self._linear_probe_params()

    def trial_budget(self) -> int:
        if not self.space.dimensions:
            return 1
        if self.search_settings.sampler == "grid":
            return min(self.search_settings.trials, len(self.grid))
        return self.search_settings.trials

    @functools.cached_property
    def grid(self) -> dict[str, dict[str, Any]]:
        """Every combination of the space by its key, in the order in which they are tried: drawn by the seed, so that
        the first ones, which a budget or a time limit leaves over, lie everywhere and not in one corner."""
        default = self.space.default_params()
        points = {params_key(point): point for point in [default, *self.space.grid_params()]}
        keys = sorted(points)
        random.Random(self.search_settings.seed).shuffle(keys)
        return {key: points[key] for key in keys}

    def warning(self) -> str | None:
        """What there is to say about a budget that does not try all that the file asks for."""
        trials = self.search_settings.trials
        if (
            self.search_settings.sampler != "grid"
            or not self.space.dimensions
            or trials >= len(self.grid)
        ):
            return None
        return (
            f"search.trials: the grid has {len(self.grid):,} combinations, of which {trials:,} are tried, drawn by search.seed; "
            f"for all of them set search.trials to {len(self.grid)}"
        )

    def _linear_probe_params(self) -> dict[str, Any] | None:
        """The default recipe frozen as deep as the space has it, for as few epochs. None where that says nothing: the head would not
        begin as a probe of pretrained features, or there is no depth to choose."""
        default = self.space.default_params()
        run = self.space.make_run({})
        ends = {
            d.name: int(d.domain.highest if d.path == FREEZE_DEPTH_PATH else d.domain.lowest)
            for d in self.space.dimensions
            if d.path in (FREEZE_DEPTH_PATH, EPOCHS_PATH) and d.name in default
        }
        probed = run.recipe.head == "probe" and run.model.options.get("weights") != "none"
        first = default | ends
        wanted = (
            probed
            and "freeze_depth" in ends
            and first != default
            and self.trial_budget() > 1
            and self.search_settings.sampler != "grid"
        )
        return first if wanted else None

    def enqueue_first_trials(self) -> None:
        """Enqueues what a new study tries first."""
        if self.linear_probe_params:
            self.study.enqueue_trial(self.linear_probe_params)
        else:
            self.study.enqueue_trial(
                self.space.default_params(), user_attrs={IS_DEFAULT_RECIPE: True}
            )

    def _default_was_enqueued(self) -> bool:
        """Whether the default recipe has been asked for; in a study that began with a budget of one trial it came first."""
        return any(
            t.user_attrs.get(IS_DEFAULT_RECIPE) for t in self.study.get_trials(deepcopy=False)
        )

    def propose_trial(self, proposal: int) -> Trial | None:
        """A trial of the study; one that waits goes before draw number `draw`. None: the grid is exhausted."""
        waiting = self.study.peek_enqueued()
        if not waiting and self.search_settings.sampler == "grid":
            asked = {
                params_key(history.requested_params(t))
                for t in self.study.get_trials(deepcopy=False)
            }
            point = next((p for key, p in self.grid.items() if key not in asked), None)
            if point is None:
                return None
            self.study.enqueue_trial(point)
        elif (
            not waiting
            and self.linear_probe_params
            and proposal == 1
            and not self._default_was_enqueued()
        ):
            self.study.enqueue_trial(
                self.space.default_params(), user_attrs={IS_DEFAULT_RECIPE: True}
            )
        # a retry draws what its first attempt drew, or would have drawn had it lived to draw everything
        proposal = int(waiting.user_attrs.get(PROPOSAL, proposal)) if waiting else proposal
        self.study.sampler = SAMPLERS[self.search_settings.sampler](
            derive_seed(self.search_settings.seed, proposal)
        )
        with self.study.window():
            return self.study.ask()

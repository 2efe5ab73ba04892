"""Which parameters are tried next: what a study begins with, and what its sampler proposes."""

import functools
import random
from typing import Any

from optuna.trial import Trial

from tuner.config.space import Dimension, Space, key_of_parameter
from tuner.search import history
from tuner.search.history import FREEZE_KEYS, IS_DEFAULT_RECIPE, PROPOSAL, params_key
from tuner.search.samplers import SAMPLERS, Startup, derive_seed, make_startup
from tuner.search.windowed_study import WindowedStudy

EPOCHS_PATH = ("recipe", "epochs")


class TrialProposer:
    """Makes the proposals of a study.

    Proposals are counted from 0. Each depends on the seed, on its number, and on the trials before
    it. The first is the linear-probe trial: what the pretrained features give with a head alone.
    The second is the default recipe. Then come the first guesses of the file, and after that the
    sampler proposes.
    """

    def __init__(self, study: WindowedStudy, space: Space) -> None:
        self.study, self.space, self.search_settings = study, space, space.settings.search
        self.linear_probe_params = self._linear_probe_params()

    def trial_budget(self) -> int:
        """Return the number of trials after which the search ends."""
        if not self.space.dimensions:
            return 1
        if self.search_settings.sampler == "grid":
            return min(self.search_settings.trials, len(self.grid))
        return self.search_settings.trials

    @property
    def tries_everything(self) -> bool:
        """Whether the budget is every run that the space describes."""
        is_grid = self.search_settings.sampler == "grid"
        return not self.space.dimensions or (is_grid and self.trial_budget() == len(self.grid))

    @functools.cached_property
    def grid(self) -> dict[str, dict[str, Any]]:
        """Every combination of the space, by its key, in the order in which they are tried.

        The seed decides the order. So the combinations that a budget or a time limit leaves over
        are spread over the space, and not all in one corner of it.
        """
        default = self.space.default_params()
        points = {params_key(point): point for point in [default, *self.space.grid_params()]}
        keys = sorted(points)
        random.Random(self.search_settings.seed).shuffle(keys)
        return {key: points[key] for key in keys}

    def warning(self) -> str | None:
        """Return a warning if the budget is too small for all that the file asks for."""
        trials = self.search_settings.trials
        is_grid = self.search_settings.sampler == "grid" and bool(self.space.dimensions)
        if not is_grid or trials >= len(self.grid):
            return None
        return (
            f"search.trials: the grid has {len(self.grid):,} combinations, of which {trials:,} "
            "are tried, drawn by search.seed; "
            f"for all of them set search.trials to {len(self.grid)}"
        )

    def late_guesses(self, proposal_count: int) -> list[dict[str, Any]]:
        """Return the first guesses of the file that were added after their turn, untried."""
        passed = self.space.first_guesses[: max(0, proposal_count - self._count_before_guesses)]
        trials = self.study.get_trials(deepcopy=False) if passed else []
        tried = {params_key(history.requested_params(t)) for t in trials}
        return [dict(guess) for guess in passed if params_key(guess) not in tried]

    def _linear_probe_params(self) -> dict[str, Any] | None:
        """Return the parameters of the linear-probe trial.

        They are the default recipe, frozen as deep as the space allows, for as few epochs as the
        space allows.

        Returns:
            None where such a trial says nothing: the head would not begin as a probe of pretrained
            features, or there is no depth to choose.
        """
        default = self.space.default_params()
        run = self.space.make_run({})
        params = self.space.choose_params(self._linear_probe_value)
        begins_as_probe = run.recipe.head == "probe" and run.model.options.get("weights") != "none"
        if (
            begins_as_probe
            and any(key_of_parameter(name) in FREEZE_KEYS for name in params)
            and params != default
            and self.trial_budget() > 1
            and self.search_settings.sampler != "grid"
        ):
            return params
        return None

    def _linear_probe_value(self, dimension: Dimension) -> Any:
        if dimension.path in {("recipe", key) for key in FREEZE_KEYS}:
            return dimension.domain.highest
        if dimension.path == EPOCHS_PATH:
            return int(dimension.domain.lowest)
        return self.space.default_value(dimension)

    def enqueue_first_trials(self) -> None:
        """Enqueue what a new study tries first, unless a trial that was taken over has tried it."""
        if self.linear_probe_params:
            trials = self.study.get_trials(deepcopy=False)
            if all(t.params != self.linear_probe_params for t in trials):
                self.study.enqueue_trial(self.linear_probe_params)
        elif not self._default_was_enqueued():
            self._enqueue_default()

    def _enqueue_default(self) -> None:
        self.study.enqueue_trial(self.space.default_params(), user_attrs={IS_DEFAULT_RECIPE: True})

    def _default_was_enqueued(self) -> bool:
        """Return whether the default recipe was enqueued before.

        In a study that began with a budget of one trial it was the first trial.
        """
        return any(
            t.user_attrs.get(IS_DEFAULT_RECIPE) for t in self.study.get_trials(deepcopy=False)
        )

    def propose_trial(self, proposal: int) -> Trial | None:
        """Start the next trial of the study: an enqueued trial, or else a new proposal.

        Args:
            proposal: The number of the next new proposal.

        Returns:
            None if every combination of the grid was tried.
        """
        waiting = self.study.peek_enqueued()
        if waiting:
            # A retry repeats the proposal of its first attempt. Where that attempt died before it
            # had asked for all its parameters, the retry gets those that it would have got.
            proposal = int(waiting.user_attrs.get(PROPOSAL, proposal))
        elif self.search_settings.sampler == "grid":
            point = self._next_grid_point()
            if point is None:
                return None
            self.study.enqueue_trial(point)
        elif self.linear_probe_params and proposal == 1 and not self._default_was_enqueued():
            self._enqueue_default()
        elif (guess := self._guess_of(proposal)) is not None:
            self.study.enqueue_trial(guess)
        self.study.sampler = SAMPLERS[self.search_settings.sampler](
            derive_seed(self.search_settings.seed, proposal), self._startup(proposal)
        )
        with self.study.window():
            return self.study.ask()

    @property
    def first_count(self) -> int:
        """The number of proposals before those of the sampler, the first guesses among them."""
        return self._count_before_guesses + len(self.space.first_guesses)

    @property
    def _count_before_guesses(self) -> int:
        return 1 if self.linear_probe_params is None else 2

    def _guess_of(self, proposal: int) -> dict[str, Any] | None:
        """Return the first guess that a proposal tries, or None where the sampler proposes."""
        guesses, index = self.space.first_guesses, proposal - self._count_before_guesses
        return dict(guesses[index]) if 0 <= index < len(guesses) else None

    def _startup(self, proposal: int) -> Startup:
        """Return what a proposal takes while there are too few trials to learn from."""
        names = [d.name for d in self.space.dimensions]
        seed = derive_seed(self.search_settings.seed)
        return make_startup(
            self.search_settings.trials, names, seed, max(0, proposal - self.first_count)
        )

    def _next_grid_point(self) -> dict[str, Any] | None:
        trials = self.study.get_trials(deepcopy=False)
        tried = {params_key(history.requested_params(t)) for t in trials}
        return next((point for key, point in self.grid.items() if key not in tried), None)

"""The best trials of a search, trained again: whether they are as good with another seed and on
other validation examples.

The best of many trials is partly the best by luck: of its seed, and of the validation examples that
chose it. So before the winner is made, the best `top` trials are trained `repeats` times more, to
the epoch to which the winner is trained again. Repeat r has its own seed, and validates on fold r
of the train and validation examples, which is the same for all of them. The best mean wins.

Where another trial is as good within noise and cheaper, that one wins, as by the one-standard-error
rule (Breiman et al., Classification and Regression Trees, 1984). As good: the mean difference over
the repeats is 0 or below its standard error; of two repeats the other trial is then better in one.
Cheaper: fewer epochs, then a deeper freeze, of the same model on the same data.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from tuner.config.run import ConfirmSettings, PluginConfig, Run, SearchSettings
from tuner.config.space import Space
from tuner.errors import TunerError
from tuner.files.checkpoint_files import remove_training_checkpoints
from tuner.files.crash_points import crash_point
from tuner.jobs import Job, Outcome, stall_of, to_tuner_error
from tuner.messages import Assignment, Epoch, TrialResult, micro_batch_count
from tuner.search import history
from tuner.search.retraining import ROUNDING, retrained_epochs, training_seconds
from tuner.search.samplers import derive_seed

# attribute of a study: what a repeat of a trial gave. Existing databases have it: never change it.
REPEAT_ATTRIBUTE = "tuner:confirm:{trial}:{repeat}"
SEED_PART = -2  # in the seed of a repeat, where a trial's has the number of its proposal
MAX_FOLDS = 20
# `search.confirm: auto`: from so many trials on, the best `top` are trained `repeats` times more.
# The best trials are among the longest, since the others are short or pruned: 4 repeats took 40 to
# 57 % of the time of 12 trials, and changed no test score beyond noise; 9 repeats took 66 % of that
# of 32 trials. The share falls with more trials, and the luck of the best of them grows.
AUTO_SETTINGS = (
    (100, ConfirmSettings(top=3, repeats=3)),
    (30, ConfirmSettings(top=2, repeats=2)),
)


def settings_for(search: SearchSettings, trial_count: int) -> ConfirmSettings | None:
    """How a search with so many trials is confirmed; None: it is not."""
    if isinstance(search.confirm, ConfirmSettings):
        return search.confirm
    if search.confirm == "none":
        return None
    return next((settings for least, settings in AUTO_SETTINGS if trial_count >= least), None)


@dataclass(frozen=True)
class Candidate:
    """A trial with the scores of its repeats; None for a repeat that failed."""

    trial: FrozenTrial
    run: Run
    scores: tuple[float | None, ...]

    @property
    def is_usable(self) -> bool:
        return None not in self.scores

    @property
    def known_scores(self) -> list[float]:
        return [score for score in self.scores if score is not None]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.known_scores)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the repeats: the noise of seed and split; None for one."""
        return statistics.stdev(self.known_scores) if len(self.known_scores) > 1 else None

    @property
    def cost(self) -> tuple[int, float]:
        """What is smaller for a cheaper trial: its epochs, and then the stages it trains."""
        return retrained_epochs(self.trial), -self.run.recipe.frozen


@dataclass(frozen=True)
class Confirmed:
    """The confirmed winner, and all candidates, the best trial first.

    `is_cheaper`: another candidate has a better mean, but not beyond noise.
    """

    winner: Candidate
    candidates: tuple[Candidate, ...]
    is_cheaper: bool

    def to_dict(self, metric: str) -> dict[str, Any]:
        """What the manifest says."""
        return {
            "metric": metric,
            "mean": self.winner.mean,
            "deviation": self.winner.deviation,
            "repeats": len(self.winner.scores),
            "is_cheaper": self.is_cheaper,
            "candidates": [
                {"trial": c.trial.number, "scores": list(c.scores)} for c in self.candidates
            ],
        }


def choose_winner(candidates: list[Candidate], sign: int = 1) -> Confirmed | None:
    """The winner by the rule above, of candidates whose repeats all have a score; None: no such.

    `sign` is -1 where lower scores are better.
    """
    usable = [c for c in candidates if c.is_usable]
    if not usable:
        return None
    best = max(usable, key=lambda c: sign * c.mean)  # the better trial where means are equal
    equal = [c for c in usable if c is best or _is_equal(c, best, sign)]
    winner = min(equal, key=lambda c: (c.cost, -sign * c.mean))
    return Confirmed(winner, tuple(candidates), winner is not best)


def _is_equal(candidate: Candidate, best: Candidate, sign: int) -> bool:
    """Whether a candidate of the same model and data is as good as the best one, within noise."""
    if (candidate.run.model, candidate.run.data) != (best.run.model, best.run.data):
        return False
    pairs = zip(best.known_scores, candidate.known_scores, strict=True)
    differences = [sign * (b - a) for b, a in pairs]
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    # The margin is for rounding: of two repeats with one tie, both sides are half the difference.
    return mean == 0 or mean < spread / math.sqrt(len(differences)) * (1 - ROUNDING)


def read_candidates(
    study: optuna.Study, space: Space, settings: ConfirmSettings
) -> list[tuple[Candidate, dict[int, dict[str, Any]]]]:
    """The best trials, the best first, each with what the study has of its repeats."""
    ranked = sorted(
        (rank, trial)
        for trial in history.completed_trials(study)
        if (rank := history.trial_rank(trial, study.direction)) is not None
    )
    attributes = study.user_attrs
    found = []
    for _, trial in ranked[: settings.top]:
        keys = {
            repeat: REPEAT_ATTRIBUTE.format(trial=trial.number, repeat=repeat)
            for repeat in range(settings.repeats)
        }
        results = {r: attributes[key] for r, key in keys.items() if key in attributes}
        scores = tuple(results.get(repeat, {}).get("score") for repeat in keys)
        run = history.run_of_trial(space, study, trial)
        found.append((Candidate(trial, run, scores), results))
    return found


def any_repeat_kept(study: optuna.Study) -> bool:
    """Whether the study has the result of a repeat."""
    return any(key.startswith(REPEAT_ATTRIBUTE.partition("{")[0]) for key in study.user_attrs)


def read_confirmed(study: optuna.Study, space: Space) -> Confirmed | None:
    """The confirmed winner, where the study has every repeat of every candidate; else None."""
    settings = settings_for(space.settings.search, len(history.ended_proposals(study)))
    if settings is None:
        return None
    candidates = read_candidates(study, space, settings)
    if any(len(results) < settings.repeats for _, results in candidates):
        return None
    sign = history.sign_of(study.direction)
    return choose_winner([candidate for candidate, _ in candidates], sign)


def fold_count(run: Run, repeats: int, train: int, valid: int) -> int:
    """Into how many folds the train and validation examples are divided for the repeats.

    So many that validation keeps about its share, each repeat has a fold of its own, and the folds
    are others than those of a cross-validation.

    Args:
        run: The run of a trial.
        repeats: The number of repeats.
        train: The number of training examples of a trial.
        valid: The number of validation examples of a trial.
    """
    count = max(2, repeats, round((train + valid) / max(1, valid)))
    count = min(count, MAX_FOLDS, max(2, (train + valid) // 2))
    if count == run.folds:
        count += -1 if count == MAX_FOLDS else 1
    return count


def run_of_repeat(run: Run, epoch: int, repeat: int, folds: int, seed: int) -> Run:
    """A trial's run up to an epoch, with the seed and the validation fold of a repeat."""
    recipe = run.recipe.model_copy(update={"stop_epoch": epoch, "patience": None})
    data = run.data
    if "folds" in data.options:  # a user's own data source may have no folds
        data = PluginConfig(data.name, {**data.options, "folds": folds, "fold": repeat % folds})
    return replace(run, recipe=recipe, data=data, seed=derive_seed(seed, SEED_PART, repeat))


class Confirmation:
    """Hands out the repeats that a study lacks, and keeps their results in the study as they come.

    An engine calls `next_job`, `report` and `on_job_end`, as it does with a coordinator. A repeat
    whose worker dies is tried again as a trial is; one that diverges, runs out of memory or fails
    takes its trial out of the comparison.

    Args:
        study: The study. Its search has ended.
        space: The space that was searched.
        settings: How many trials are repeated how often.
        split_sizes: The numbers of training and validation examples.
        make_assignment: Makes the assignment of a run.
        checkpoints: The folder for checkpoints; None: there are none.
        tell: Hears a trial's number, a repeat from 0, and its score, or None and why there is none.
        should_stop: Whether the search is stopped.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        settings: ConfirmSettings,
        split_sizes: tuple[int, int],
        make_assignment: Callable[[Run], Assignment],
        checkpoints: Path | None,
        tell: Callable[[int, int, float | None, str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.study, self.space, self.settings = study, space, settings
        self.split_sizes, self.make_assignment = split_sizes, make_assignment
        self.checkpoints, self.tell, self.should_stop = checkpoints, tell, should_stop
        self.error: TunerError | None = None
        self.attempts: dict[tuple[int, int], int] = {}
        self.kills: dict[tuple[int, int], int] = {}
        self.runs: dict[int, Run] = {}
        self.epochs: dict[int, int] = {}
        self.missing: list[tuple[int, int]] = []
        candidates = read_candidates(study, space, settings)
        for candidate, results in candidates:
            number = candidate.trial.number
            self.runs[number] = candidate.run
            self.epochs[number] = retrained_epochs(candidate.trial)
            for repeat in results:
                self._remove_checkpoints(number, repeat)
        # all trials once before any of them twice, so that workers share what a fold has cached
        for repeat in range(settings.repeats):
            self.missing += [
                (candidate.trial.number, repeat)
                for candidate, results in candidates
                if repeat not in results
            ]
        self.count = len(self.missing)

    @property
    def trial_numbers(self) -> list[int]:
        """The numbers of the candidates, the best trial first."""
        return list(self.runs)

    def estimate_seconds(self, workers: int) -> float:
        """How long the missing repeats take, by the time that their trials took."""
        trials = {t.number: t for t in history.completed_trials(self.study)}
        total = 0.0
        for number, _ in self.missing:
            total += training_seconds(trials[number], self.runs[number])
        return total / max(1, min(workers, len(self.missing)))

    # -- what an engine calls

    def next_job(self) -> Job | None:
        """The next repeat; None: none is left, or the search stops."""
        if not self.missing or self.error is not None or self.should_stop():
            return None
        number, repeat = self.missing.pop(0)
        search, run = self.space.settings.search, self.runs[number]
        folds = fold_count(run, self.settings.repeats, *self.split_sizes)
        key = number, repeat
        self.attempts[key] = self.attempts.get(key, 0) + 1
        folder = self._checkpoint_folder(number, repeat)
        assignment = replace(
            self.make_assignment(
                run_of_repeat(run, self.epochs[number], repeat, folds, search.seed)
            ),
            checkpoint_folder=str(folder) if folder else None,
            micro_batches=micro_batch_count(
                self.attempts[key], self.kills.get(key, 0), search.retries
            ),
        )
        return Job(
            number * self.settings.repeats + repeat,
            "tuner.training.worker_jobs:run_repeat",
            assignment,
            (str(folder),) if folder else (),
            stall=stall_of(self.space.settings.engine, paced=True),
        )

    def report(self, job: Job, epoch: Epoch) -> bool:
        """Whether the repeat goes on."""
        return not self.should_stop()

    def on_job_end(self, job: Job, outcome: Outcome) -> None:
        """Keeps what a repeat gave, or has it tried again."""
        number, repeat = divmod(job.number, self.settings.repeats)
        if outcome.kind == "done":
            self._keep_result(number, repeat, outcome.value)
        elif outcome.kind == "refused":
            self.error = to_tuner_error(outcome)
        elif outcome.kind == "failed":
            self._keep(number, repeat, {"score": None, "reason": outcome.reason})
        elif not (outcome.loss_cause == "interrupted" or self.should_stop()):
            self._retry(number, repeat, outcome)

    # -- inside

    def _retry(self, number: int, repeat: int, outcome: Outcome) -> None:
        key = number, repeat
        self.kills[key] = self.kills.get(key, 0) + (outcome.loss_cause == "memory")
        if self.attempts[key] > self.space.settings.search.retries:
            self._keep(number, repeat, {"score": None, "reason": outcome.reason})
        else:
            self.missing.insert(0, key)

    def _keep_result(self, number: int, repeat: int, result: TrialResult) -> None:
        if result.state == "stopped":
            return
        if result.state != "complete":
            reason = f"{result.state}: {result.reason}"
            self._keep(number, repeat, {"score": None, "reason": reason})
            return
        scores = result.epochs[-1].scores
        score = scores[str(self.space.settings.search.metric)]
        seconds = round(result.seconds, 3)
        self._keep(number, repeat, {"score": score, "scores": scores, "seconds": seconds})

    def _keep(self, number: int, repeat: int, result: dict[str, Any]) -> None:
        key = REPEAT_ATTRIBUTE.format(trial=number, repeat=repeat)
        self.study.set_user_attr(key, result)
        crash_point("confirm.kept")
        self._remove_checkpoints(number, repeat)
        self.tell(number, repeat, result["score"], result.get("reason", ""))

    def _checkpoint_folder(self, number: int, repeat: int) -> Path | None:
        name = f"confirm-{number}-{repeat}"
        return self.checkpoints / name if self.checkpoints is not None else None

    def _remove_checkpoints(self, number: int, repeat: int) -> None:
        folder = self._checkpoint_folder(number, repeat)
        if folder is not None:
            remove_training_checkpoints(folder)

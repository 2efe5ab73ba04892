"""The projection pruner judges a trial by those like it: what rises late is left to rise, what is alike and low ends."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuner.config.run import SearchSettings
from tuner.search.pruners import PRUNERS

CURVES = Path(__file__).parents[2] / "benchmarks" / "plots" / "pruners.json"
KINDS = {"freeze_depth": IntDistribution(0, 5), "epochs": IntDistribution(1, 10)}


def trial(
    depth: int, epochs: int, values: list[float], state: TrialState = TrialState.COMPLETE
) -> FrozenTrial:
    return create_trial(
        params={"freeze_depth": depth, "epochs": epochs},
        distributions=KINDS,
        intermediate_values=dict(enumerate(values, 1)),
        value=max(values) if state == TrialState.COMPLETE else None,
        state=state,
    )


DEEP = [
    trial(5, 4, [0.70, 0.71, 0.71, 0.72]) for _ in range(6)
]  # heads alone are soon where they end
WHOLE = [trial(0, 8, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8]) for _ in range(5)]


def pruned(now: FrozenTrial, before: list[FrozenTrial], pruner: str = "projection") -> bool:
    """Whether a trial ends, which is the same in a study that minimises the negative values."""
    study = optuna.create_study(direction="maximize", pruner=PRUNERS[pruner](8))
    study.add_trials(before)
    mirrored = optuna.create_study(direction="minimize", pruner=PRUNERS[pruner](8))
    mirrored.add_trials([negative(peer) for peer in before])
    ends = study.pruner.prune(study, now)
    assert mirrored.pruner.prune(mirrored, negative(now)) == ends
    return ends


def negative(trial: FrozenTrial) -> FrozenTrial:
    values = {step: -value for step, value in trial.intermediate_values.items()}
    value = None if trial.value is None else -trial.value
    return create_trial(
        state=trial.state,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=values,
        value=value,
    )


@pytest.mark.parametrize(("pruner", "ended"), [("projection", False), ("median", True)])
def test_a_model_trained_whole_is_not_judged_by_heads_alone(pruner: str, ended: bool) -> None:
    now = trial(0, 8, [0.2, 0.3, 0.4], TrialState.RUNNING)
    assert pruned(now, DEEP + WHOLE, pruner) == ended


def test_a_head_alone_as_low_ends_and_so_does_a_whole_model_below_its_like() -> None:
    assert pruned(trial(5, 4, [0.4, 0.4, 0.4], TrialState.RUNNING), DEEP + WHOLE)
    assert pruned(trial(0, 8, [0.1, 0.1, 0.1], TrialState.RUNNING), DEEP + WHOLE)


def test_a_long_trial_is_compared_at_the_same_share_of_its_length() -> None:
    short = [trial(0, 3, [0.5, 0.6, 0.8]) for _ in range(6)]
    long = trial(0, 10, [0.3, 0.4, 0.5], TrialState.RUNNING)
    assert not pruned(long, short) and pruned(long, short, "median")


def test_a_key_with_several_ranges_is_one_key() -> None:
    """Trials of 3 and of 10 epochs are compared at equal shares, whichever range their epochs are from."""

    def renamed(t: FrozenTrial) -> FrozenTrial:
        name = "epochs[sgd]" if t.params["epochs"] == 3 else "epochs[adamw]"
        params = {name: t.params["epochs"], "freeze_depth[sgd]": t.params["freeze_depth"]}
        kinds = {name: KINDS["epochs"], "freeze_depth[sgd]": KINDS["freeze_depth"]}
        return create_trial(
            params=params,
            distributions=kinds,
            intermediate_values=t.intermediate_values,
            value=None if t.state == TrialState.RUNNING else t.value,
            state=t.state,
        )

    short = [renamed(trial(0, 3, [0.5, 0.6, 0.8])) for _ in range(6)]
    assert not pruned(renamed(trial(0, 10, [0.3, 0.4, 0.5], TrialState.RUNNING)), short)
    heads = [renamed(t) for t in DEEP + WHOLE]
    assert not pruned(renamed(trial(0, 8, [0.2, 0.3, 0.4], TrialState.RUNNING)), heads)


def test_none_is_judged_by_its_first_epoch_nor_before_five_have_completed() -> None:
    assert not pruned(trial(5, 4, [0.0], TrialState.RUNNING), DEEP)
    assert pruned(trial(5, 4, [0.0] * 2, TrialState.RUNNING), DEEP)
    assert not pruned(trial(5, 4, [0.0] * 3, TrialState.RUNNING), DEEP[:4])
    assert not pruned(trial(5, 4, [], TrialState.RUNNING), DEEP)


def test_where_nothing_is_searched_but_the_rate_its_length_is_the_files() -> None:
    alike = [
        create_trial(value=0.8, intermediate_values=dict(enumerate([0.5, 0.6, 0.7, 0.8], 1)))
        for _ in range(5)
    ]
    study = optuna.create_study(direction="maximize", pruner=PRUNERS["projection"](4))
    study.add_trials(alike)
    for value, ended in ((0.3, True), (0.75, False)):
        now = create_trial(
            state=TrialState.RUNNING, intermediate_values=dict.fromkeys((1, 2, 3), value)
        )
        assert study.pruner.prune(study, now) == ended


# -- on curves of real studies that were searched by TPE without pruning


def replay(trials: list[dict[str, Any]], pruner: str) -> tuple[float, float]:
    """The best score of the trials that complete, and the share of the epochs that are trained."""
    study = optuna.create_study(direction="maximize", pruner=PRUNERS[pruner](8))
    best, trained = 0.0, 0
    for number, known in enumerate(trials):
        study.enqueue_trial(known["params"])
        now = study.ask(KINDS)
        for epoch, score in enumerate(known["scores"], 1):
            now.report(score, epoch)
            trained += 1
            may_end = number != 1 and epoch < len(known["scores"])  # 1 is the default recipe
            if may_end and now.should_prune():
                study.tell(now, state=TrialState.PRUNED)
                break
        else:
            best = max(best, *known["scores"])
            study.tell(now, max(known["scores"]))
    return best, trained / sum(len(known["scores"]) for known in trials)


def test_the_default_pruner_saves_epochs_of_real_studies_and_keeps_their_best_trials() -> None:
    default = SearchSettings().pruner
    studies = [s for s in json.loads(CURVES.read_text())["studies"] if s["sampler"] == "tpe"]
    assert len(studies) >= 3
    lost = dict.fromkeys((default, "median"), 0.0)
    shares = []
    for study in studies:
        winner = max(max(trial["scores"]) for trial in study["trials"])
        for pruner in lost:
            best, share = replay(study["trials"], pruner)
            lost[pruner] += (winner - best) / len(studies)
            if pruner == default:
                shares.append(share)
    assert lost[default] < 0.002 and lost["median"] > 0.01
    assert sum(shares) / len(shares) < 0.85

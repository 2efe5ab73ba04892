"""What the studies of a folder hold."""

from pathlib import Path
from typing import Any

import optuna

from tuner.search import storage


def ended_trials(folder: Path, name: str) -> list[tuple[Any, ...]]:
    """Parameters and epoch scores of the trials that ended, in the order of their draws."""

    study = optuna.load_study(
        study_name=name, storage=storage.open_storage(None, folder / "studies" / name)
    )
    assert all(t.state.is_finished() for t in study.trials)
    return [
        (t.params, t.state.name, t.intermediate_values)
        for t in study.trials
        if t.state.name in ("COMPLETE", "PRUNED")
    ]

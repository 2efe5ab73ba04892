"""An Optuna whose inner names are others, as a later version's may be, and a search that runs with it.

`python -m tests.helpers.renamed_optuna FOLDER`, with the folder of such an Optuna first in PYTHONPATH.
"""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

# name in `missing()` -> what is renamed where in Optuna to make it missing
RENAMED = {
    "Study._get_trials": ("**/*.py", "_get_trials"),
    "Study._pop_waiting_trial_id": ("**/*.py", "_pop_waiting_trial_id"),
    "Trial._cached_frozen_trial": ("**/*.py", "_cached_frozen_trial"),
    "Trial.storage": ("trial/_trial.py", r"(?<=self\.)storage"),
    "_CachedStorage._backend": ("storages/_cached_storage.py", "_backend"),
    "RDBStorage._create_new_trial": ("storages/**/*.py", "_create_new_trial"),
    "RDBStorage._get_trials": ("storages/**/*.py", "_get_trials"),
    "FrozenStudy": ("**/*.py", "FrozenStudy"),
    "the tables of optuna.storages._rdb.models": ("storages/_rdb/**/*.py", "BaseModel"),
    "Study._study_id": ("**/*.py", "_study_id"),
    "Trial._trial_id": ("**/*.py", "_trial_id"),
    "Study._storage": ("**/*.py", r"(?:(?<=self\.)|(?<=tudy\.))_storage"),
}


def rename(folder: Path, *names: str) -> None:
    """Makes `folder/optuna`, the installed one in which these names are others."""
    spec = importlib.util.find_spec("optuna")
    assert spec is not None and spec.origin is not None
    copy = folder / "optuna"
    shutil.copytree(
        Path(spec.origin).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    for number, name in enumerate(names):
        pattern, word = RENAMED[name]
        whole_word = re.compile(rf"{word}\b" if word.startswith("(") else rf"\b{word}\b")
        for path in copy.glob(pattern):
            path.write_text(whole_word.sub(f"_renamed_{number}", path.read_text()))


def search(folder: Path) -> dict[str, Any]:
    """What a search over trials of moments comes to, and what is warned of."""
    import optuna

    from tests.helpers.instant_engine import make_coordinator, make_space, run_all_jobs
    from tuner.errors import StorageError
    from tuner.search import storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings: list[str] = []
    refused = ""
    try:
        storage.open_storage("postgresql://nobody:no@127.0.0.1:1/none", folder)
    except StorageError as error:
        refused = str(error)
    try:
        database = storage.open_storage(None, folder, warnings.append)
        c = make_coordinator(make_space(trials=14, sampler="tpe"), database)
        run_all_jobs(c)
    except StorageError as error:
        return {"error": str(error)}
    trials = [
        [t.number, t.state.name, t.params, t.value, sorted(t.intermediate_values.items())]
        for t in c.study.get_trials()
    ]
    return {"trials": trials, "closed": c.budget_used, "warnings": warnings, "refused": refused}


if __name__ == "__main__":
    print(json.dumps(search(Path(sys.argv[1]))))

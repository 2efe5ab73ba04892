"""What tuner uses of optuna-dashboard beside its documented functions.

Inner names, its page's script, its notes.

Another version may change any of this. `trouble` tries it out; where it does not work, the
dashboard serves Optuna's own answers. optuna_dashboard is imported inside the functions: the
coordinator writes notes and never needs the rest.
"""

import functools
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial

NOTE_PIECE = 2045  # characters of a note that are kept in one attribute
OF_TRIAL = re.compile(
    r"(?:dashboard|dashboard:artifacts):(\d+):"
)  # keys of the attributes that a study keeps for one of its trials
# where the page's script begins to draw the timeline of a list of trials, whatever its inner names
TIMELINE = re.compile(
    r"if\(null===document\.getElementById\((\w+)\)\)return;"
    r"(?=if\(0===(\w+)\.length\)return void \w+\.react\(\1,\[\],\{template:\w+\}\);"
    r"const \w+=\{Complete:)"
)

Attributes = Mapping[str, Any]


def note_attributes(
    trial: int | None, body: str, before: Attributes = MappingProxyType({})
) -> dict[str, Any]:
    """A note as the attributes of its study.

    `trial` is the id of the trial that it is about, if any. `before` are the attributes that the
    study has: an earlier note is replaced.
    """
    begin = "dashboard:" if trial is None else f"dashboard:{trial}:"
    piece, version = f"{begin}note_str:", f"{begin}note_ver"
    pieces = range(0, len(body), NOTE_PIECE)
    empty = {key: "" for key in before if key.startswith(piece)}  # of a longer note
    found: dict[str, Any] = {
        f"{piece}{number}": body[start : start + NOTE_PIECE] for number, start in enumerate(pieces)
    }
    # last: it says that the note is whole
    return empty | found | {version: int(before.get(version, 0)) + 1}


def read_study_note(attributes: Attributes) -> str:
    """The body of a study's note; empty where there is none."""
    count = sum(key.startswith("dashboard:note_str:") for key in attributes)
    return "".join(str(attributes.get(f"dashboard:note_str:{i}", "")) for i in range(count))


def new_cache() -> Any:
    """What `read_trials` and `search_space` remember of a study."""
    from optuna_dashboard._inmemory_cache import InMemoryCache

    return InMemoryCache()


def read_trials(cache: Any, storage: BaseStorage, study: int) -> list[FrozenTrial]:
    """A study's trials, read anew every few seconds."""
    from optuna_dashboard._storage import get_trials

    found: list[FrozenTrial] = get_trials(cache, storage, study)
    return found


def search_space(cache: Any, study: int, trials: list[FrozenTrial]) -> tuple[Any, ...]:
    """What the page shows of all trials together.

    Only `trials` are looked at, the cache knows the others.
    """
    from optuna_dashboard._inmemory_cache import get_cached_extra_study_property

    return tuple(get_cached_extra_study_property(cache, study, trials))


def describe_trial(study: int, trial: FrozenTrial, attributes: Attributes) -> dict[str, Any]:
    """A trial as the page loads it. `attributes` are those that the study keeps for it."""
    from optuna_dashboard._serializer import serialize_frozen_trial

    found: dict[str, Any] = serialize_frozen_trial(study, trial, attributes)
    return found


def describe_study(study: Any, extra: tuple[Any, ...]) -> dict[str, Any]:
    """A FrozenStudy as the page loads it, without any trial.

    `extra` is what `search_space` gave.
    """
    from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
    from optuna_dashboard._serializer import serialize_study_detail

    plots = get_plotly_graph_objects(study.system_attrs)
    found: dict[str, Any] = serialize_study_detail(study, [], [], *extra, plots, [])
    return found


@functools.cache
def script(bars: int) -> bytes:
    """The page's JavaScript, whose timeline draws the latest `bars` trials.

    Where another version draws its timeline otherwise, the script is as it was.
    """
    import optuna_dashboard

    public = Path(optuna_dashboard.__file__).parent / "public"
    text = (public / "bundle.js").read_text(encoding="utf-8")
    return TIMELINE.sub(rf"\g<0>\2=\2.slice(-{bars});", text, count=1).encode()


def trouble() -> str:
    """What does not work with the installed version, in words; empty where everything does."""
    try:
        wrong = try_out()
    except Exception as error:  # an inner name that is gone or has changed fails in any way
        wrong = f"{type(error).__name__}: {error}"
    version = importlib.metadata.version("optuna-dashboard")
    return f"optuna-dashboard {version} differs inside ({wrong})" if wrong else ""


def try_out() -> str:
    """Calls every function on a study of one trial, in memory, and says which answer is not the
    expected one.
    """
    storage, cache = InMemoryStorage(), new_cache()
    study = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "tried out")
    made = storage.create_new_trial(
        study,
        optuna.trial.create_trial(
            params={"lr": 0.5},
            distributions={"lr": optuna.distributions.FloatDistribution(0, 1)},
            value=0.25,
            intermediate_values={1: 0.25},
        ),
    )
    body = "x" * (NOTE_PIECE + 1)
    for about in (None, made):
        for key, value in note_attributes(about, body).items():
            storage.set_study_system_attr(study, key, value)
    (frozen,) = storage.get_all_studies()
    trials = read_trials(cache, storage, study)
    whole = describe_study(frozen, search_space(cache, study, trials))
    one = describe_trial(study, trials[0], frozen.system_attrs)
    json.dumps([whole, one])  # raises where an answer is not made of plain values
    note = {"version": 1, "body": body}
    expected: dict[str, Any] = {"name": "tried out", "note": note, "trials": [], "best_trials": []}
    different = [key for key, value in expected.items() if whole.get(key) != value]
    different += (
        ["has_intermediate_values"] if whole.get("has_intermediate_values") is not True else []
    )
    expected = {"trial_id": made, "number": 0, "state": "Complete", "note": note, "values": [0.25]}
    different += [key for key, value in expected.items() if one.get(key) != value]
    return f"its answer has another {', '.join(different)}" if different else ""

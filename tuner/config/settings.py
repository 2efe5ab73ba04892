"""The sections without ranges: search, engine, storage, export, track."""

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tuner.config import database_url, fields, plugins, section_keys
from tuner.config.draft import Draft
from tuner.config.objective import is_own_metric
from tuner.config.run import EngineSettings, SearchSettings, Settings
from tuner.config.search_settings import AS_MANY_AS_FIT
from tuner.config.space import KeyPath
from tuner.config.yaml_document import describe_value
from tuner.errors import NO_MEAN_OF_OUTPUTS, SpaceError, suggest_names

RAY_ONLY_KEYS = (
    "address",
    "cpus_per_trial",
    "ship",
)  # engine keys that only ray has
EXPORT_FORMATS = ("safetensors", "torch_export", "onnx")  # by default
MORE_FORMATS = ("onnx_fp16", "onnx_int8", "openvino")  # of most models, where they are named
# keys of search that only some tasks have: the values that every task may have, and why not others
KEYS_OF_SOME_TASKS = {
    "calibrate": (
        ("temperature", "none"),
        "a temperature divides the logits of examples that have classes or labels as a whole",
    ),
    "test_flips": ((False,), NO_MEAN_OF_OUTPUTS),
}
MAX_NAME_BYTES = 255  # bytes, of a folder's name


def read_settings(draft: Draft) -> Settings | None:
    """The settings; None if there is a problem with them."""
    before = len(draft.problems)
    read_plain_section(draft, "search", SearchSettings)
    read_plain_section(draft, "engine", EngineSettings)
    check_plugin(draft, "engine", ("engine", "name"), draft.values.get(("engine", "name"), "local"))
    check_gpu_sharing(draft)
    check_gpus_per_trial(draft)
    check_engine_keys(draft)
    check_study_name(draft)
    resolve_metric(draft)
    leave_trials_to_time(draft)
    check_search_of_task(draft)
    check_earlier_studies(draft)
    storage, formats = read_storage_url(draft), read_export_formats(draft)
    trackers = read_trackers(draft)
    if len(draft.problems) > before:
        return None
    search, engine = (
        {p[1]: draft.values.pop(p) for p in list(draft.values) if p[0] == section}
        for section in ("search", "engine")
    )
    return Settings(SearchSettings(**search), EngineSettings(**engine), storage, formats, trackers)


def leave_trials_to_time(draft: Draft) -> None:
    """With `search.time` and no `search.trials` the time alone is the budget."""
    written = draft.document.content.get("search")
    if isinstance(written, dict) and "trials" in written:
        return
    if draft.values.get(("search", "time")) is not None:
        draft.values["search", "trials"] = AS_MANY_AS_FIT


def read_plain_section(
    draft: Draft, section: str, schema: type[SearchSettings] | type[EngineSettings]
) -> None:
    """A section of values; `engine: local` is short for `engine: {name: local}`."""
    written = draft.document.content.get(section)
    if isinstance(written, str) and section == "engine":
        written = {"name": written}
    if written is not None and not isinstance(written, dict):
        draft.add_problem((section,), f"expected a mapping of keys, got {describe_value(written)}")
    read_values(draft, (section,), written if isinstance(written, dict) else {}, schema)


def read_values(
    draft: Draft, path: KeyPath, given: Mapping[str, Any], schema: type[BaseModel]
) -> None:
    """A mapping of keys with one value each. A key whose value is a mapping is read in the same
    way.
    """
    known_keys, plain = dict(schema.model_fields), {}
    for key, value in given.items():
        inner = fields.mapping_schema(known_keys[key]) if key in known_keys else None
        if inner is not None and isinstance(value, dict):
            read_mapping(draft, (*path, key), value, inner)
            del known_keys[key]
        elif key in known_keys and (
            isinstance(value, dict)
            or (isinstance(value, list) and not fields.is_sequence(known_keys[key]))
        ):
            draft.add_problem(
                (*path, key),
                f"{path[0]} holds no ranges or choices; expected one value, got "
                f"{describe_value(value)}",
            )
        else:
            plain[key] = value
    section_keys.read_section(draft, path, plain, known_keys)


def read_mapping(
    draft: Draft, path: KeyPath, given: Mapping[str, Any], schema: type[BaseModel]
) -> None:
    """A key whose value is a mapping; the keys in it that are left out have their defaults."""
    before = len(draft.problems)
    read_values(draft, path, given, schema)
    values = {key: draft.values.pop((*path, key), None) for key in schema.model_fields}
    for key in schema.model_fields:
        draft.fields.pop((*path, key), None)
    if len(draft.problems) == before:
        draft.values[path] = schema(**values)


def check_gpu_sharing(draft: Draft) -> None:
    """Checks that `gpus` and `per_gpu` have a meaning for this device and engine.

    They have none where the device is no GPU or is one GPU by its number, and none where a cluster
    assigns the GPUs.
    """
    name, device, gpus, share = (
        draft.values.get(("engine", key)) for key in ("name", "device", "gpus", "per_gpu")
    )
    for key, default in (("gpus", None), ("per_gpu", 1)) if name == "ray" else ():
        if draft.values.get(("engine", key)) != default:
            draft.add_problem(
                ("engine", key),
                f"Ray deals out the GPUs; drop {key}, and write gpus_per_trial for a part of one",
            )
    if gpus is not None and device not in ("auto", "cuda"):
        draft.add_problem(
            ("engine", "gpus"),
            f"which GPUs is already said by device: {device}; keep one of the two, or write "
            "device: cuda",
        )
    workers = draft.values.get(("engine", "workers"))
    if share == "auto" and isinstance(workers, int):
        draft.add_problem(
            ("engine", "per_gpu"),
            f"auto, but workers: {workers} already says how many there are; keep one of the two",
        )
    if isinstance(share, int) and share > 1 and device in ("cpu", "mps"):
        draft.add_problem(
            ("engine", "per_gpu"),
            f"is for GPUs, and device is {device}; for several workers write workers: {share}",
        )


def check_gpus_per_trial(draft: Draft) -> None:
    """Checks that the engine can give one trial so many GPUs, or such a part of one."""
    name, device, share, count = (
        draft.values.get(("engine", key)) for key in ("name", "device", "per_gpu", "gpus_per_trial")
    )
    if not isinstance(count, int | float) or isinstance(count, bool):
        return
    problem = None
    if name == "ray":
        if count > 1:
            problem = (
                f"must be at most 1 with Ray, got {count:g}; several GPUs train one model with "
                "engine: {name: local}"
            )
    elif count != int(count) or count < 1:
        problem = (
            f"a whole number of GPUs, at least 1, got {count:g}; for several trials on one GPU "
            "write per_gpu: 2"
        )
    elif count > 1 and name == "inline":
        problem = f"{count:g}, but the engine inline has one process; write name: local"
    elif count > 1 and share != 1:
        problem = f"{count:g}, and per_gpu: {share}; a trial has several GPUs, or a part of one"
    elif count > 1 and (device == "mps" or str(device).startswith("cuda:")):
        problem = f"{count:g}, but device: {device} is one GPU; write device: cuda"
    if problem:
        draft.add_problem(("engine", "gpus_per_trial"), problem)


def check_earlier_studies(draft: Draft) -> None:
    """Refuses `search.from` where the winner is not retrained.

    The weights of trials that are taken over stay in their own study.
    """
    search = {key: draft.values.get(("search", key)) for key in ("from", "retrain")}
    if search["from"] and search["retrain"] is False:
        draft.add_problem(
            ("search", "from"),
            "needs search.retrain: true: a winner that was taken over leaves no weights here",
        )


def check_plugin(draft: Draft, what: str, path: tuple[str | int, ...], name: Any) -> None:
    """Checks that a plug-in exists: a built-in one by its file, the user's own by importing it."""
    names = plugins.list_names(what)
    if not isinstance(name, str) or (":" not in name and name not in names):
        draft.add_problem(
            path,
            f"{name!r} is not known{suggest_names(name, names)}; your own goes as "
            "package.module:attribute",
        )
    elif ":" in name:
        load_own(draft, what, path, name)


def load_own(draft: Draft, what: str, path: tuple[str | int, ...], name: str) -> Any:
    """What the user's own name stands for; None, with the problem, where it cannot be imported."""
    try:
        return plugins.load_plugin(what, name)
    except SpaceError as error:
        draft.problems.extend(
            draft.document.format_problem(path, problem) for problem in error.problems
        )
        return None


def check_engine_keys(draft: Draft) -> None:
    """Refuses keys that the chosen engine does not have. A key at its default is no problem."""
    name = draft.values.get(("engine", "name"), "local")
    for key in RAY_ONLY_KEYS if name != "ray" and name in plugins.list_names("engine") else ():
        value = draft.values.get(("engine", key))
        if value != EngineSettings.model_fields[key].default:
            draft.add_problem(
                ("engine", key),
                f"{value!r}, but only the engine ray has this key; drop it, or write engine: "
                f"{{name: ray, …}}",
            )


def check_study_name(draft: Draft) -> None:
    """Checks that a folder can have the study's name, which is written or taken from the file's
    name.
    """
    written = draft.values.get(("search", "name"))
    name = Path(draft.document.file).stem if written is None else written
    size = len(name.encode(errors="surrogateescape"))
    if size > MAX_NAME_BYTES:
        draft.add_problem(
            ("search", "name"),
            f"a study's name is a folder's name: at most {MAX_NAME_BYTES} bytes, got {size}",
        )
    elif not name.isprintable() or name.startswith("."):
        draft.add_problem(
            ("search", "name"), f"a study cannot be called {name!r}; write search: {{name: …}}"
        )


def resolve_metric(draft: Draft) -> None:
    """Sets the metric, the task's first one if the file names none, and its direction."""
    task, written = draft.values.get(("task", "name")), draft.values.get(("search", "metric"))
    try:
        allowed = plugins.list_metrics(task) if isinstance(task, str) else ()
        minimised = plugins.list_minimised(task) if isinstance(task, str) else ()
    except SpaceError:
        return  # what is wrong with the task is said there
    metric = allowed[0] if written is None and allowed else written
    draft.values["search", "metric"] = metric
    if isinstance(metric, str) and is_own_metric(metric):
        is_minimised = read_own_metric(draft, metric)
        draft.values["search", "direction"] = draft.values.get(("search", "direction")) or (
            "minimise" if is_minimised else "maximise"
        )
        return
    resolve_direction(draft, metric, allowed, minimised)
    if metric is None and task is not None:
        draft.add_problem(
            ("search", "metric"), f"is needed: {task} has no METRICS beside it to take the first of"
        )
    elif allowed and metric not in allowed:
        draft.add_problem(
            ("search", "metric"),
            f"{metric!r} is not a metric of {task}{suggest_names(metric, allowed)}; your own "
            "goes as package.module:function",
        )


def read_own_metric(draft: Draft, metric: str) -> bool:
    """Checks a metric function of the user's own; whether its attribute `minimised` is true."""
    path = ("search", "metric")
    function = load_own(draft, "metric", path, metric)
    if function is None:
        return False
    try:
        inspect.signature(function).bind("predictions", "targets")
    except (TypeError, ValueError) as error:
        draft.add_problem(
            path,
            f"{metric!r} is called as function(predictions, targets), and takes others: {error}",
        )
    return bool(getattr(function, "minimised", False))


def resolve_direction(
    draft: Draft, metric: Any, allowed: Collection[str], minimised: Collection[str]
) -> None:
    """Sets the direction of a metric of the task, which the file must not contradict."""
    path = ("search", "direction")
    known, written = "minimise" if metric in minimised else "maximise", draft.values.get(path)
    if metric in allowed and written not in (None, known):
        draft.add_problem(
            path, f"{written}, but {metric} is {known}d; drop the key, or choose another metric"
        )
    draft.values[path] = written or known


def check_search_of_task(draft: Draft) -> None:
    """Refuses values of `search` that mean nothing for the task."""
    task = draft.values.get(("task", "name"))
    try:
        known = plugins.read_task_names(task, "SEARCH_KEYS") if isinstance(task, str) else None
    except SpaceError:
        return  # what is wrong with the task is said there
    for key, (allowed, reason) in KEYS_OF_SOME_TASKS.items():
        value = draft.values.get(("search", key), allowed[0])
        if known is None or key in known or value in allowed:
            continue
        others = [
            name
            for name in plugins.list_names("task")
            if key in plugins.read_task_names(name, "SEARCH_KEYS")
        ]
        is_own = ":" in str(task)
        own = f"; name it in SEARCH_KEYS beside METRICS if {task} has it" if is_own else ""
        draft.add_problem(
            ("search", key),
            f"{json.dumps(value)}, but {task} has no such key, only "
            f"{fields.join_alternatives(others)}: {reason}; drop the key{own}",
        )


def read_storage_url(draft: Draft) -> str | None:
    value = draft.document.content.get("storage")
    if value is not None and not isinstance(value, str):
        draft.add_problem(
            ("storage",),
            f"expected a database URL such as postgresql://host/name, got {describe_value(value)}",
        )
        return None
    for problem in database_url.find_url_problems(value or ""):
        draft.add_problem(("storage",), problem)
    return value


def read_export_formats(draft: Draft) -> tuple[str, ...]:
    model = draft.values.get(("model", "name"))
    holds = (
        plugins.read_model_constant(model, "EXPORTS", (*EXPORT_FORMATS, *MORE_FORMATS))
        if isinstance(model, str)
        else plugins.list_names("export")
    )
    written = draft.document.content.get(
        "export", [name for name in EXPORT_FORMATS if name in holds]
    )
    formats = read_names(draft, "export", "export", "formats", written)
    for i, name in enumerate(formats):
        if name in plugins.list_names("export") and name not in holds:
            draft.add_problem(
                ("export", i), f"{name} cannot hold {model}; {fields.join_alternatives(holds)} can"
            )
    return tuple(dict.fromkeys(formats))


def read_trackers(draft: Draft) -> tuple[str, ...]:
    """The trackers under `track`. Whether their packages are there is asked before a search."""
    written = draft.document.content.get("track")
    return tuple(dict.fromkeys(read_names(draft, "track", "tracker", "trackers", written)))


def read_names(draft: Draft, key: str, kind: str, words: str, written: Any) -> list[str]:
    """One plug-in of a kind, or a list of them; empty where the file has no list."""
    names = [] if written is None else [written] if isinstance(written, str) else written
    if not isinstance(names, list):
        draft.add_problem(
            (key,),
            f"expected a list of {words} ({', '.join(plugins.list_names(kind))}), got "
            f"{describe_value(names)}",
        )
        return []
    for i, name in enumerate(names):
        check_plugin(draft, kind, (key, i), name)
    return [str(name) for name in names]

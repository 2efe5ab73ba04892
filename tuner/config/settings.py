"""The sections without ranges: search, engine, storage, export."""

from pathlib import Path
from typing import Any

from tuner.config import database_url, fields, plugins, section_keys
from tuner.config.draft import Draft
from tuner.config.run import Engine, Search, Settings
from tuner.config.yaml_document import kind
from tuner.errors import SpaceError, suggest

RAY = ("address", "gpus_per_trial", "cpus_per_trial", "ship")  # engine keys that only ray has
EXPORTS = ("safetensors", "torch_export", "onnx")
MAX_NAME = 255  # bytes, of a folder's name


def settings(draft: Draft) -> Settings | None:
    """None when something is wrong with them."""
    before = len(draft.problems)
    plain(draft, "search", Search)
    plain(draft, "engine", Engine)
    known(draft, "engine", ("engine", "name"), draft.values.get(("engine", "name"), "local"))
    sharing(draft)
    foreign(draft)
    study_name(draft)
    metric(draft)
    storage, formats = database(draft), export(draft)
    if len(draft.problems) > before:
        return None
    search, engine = (
        {p[1]: draft.values.pop(p) for p in list(draft.values) if p[0] == section}
        for section in ("search", "engine")
    )
    return Settings(Search(**search), Engine(**engine), storage, formats)


def plain(draft: Draft, section: str, schema: type[Search] | type[Engine]) -> None:
    """A section of values; `engine: local` is short for `engine: {name: local}`."""
    written = draft.doc.tree.get(section)
    if isinstance(written, str) and section == "engine":
        written = {"name": written}
    if written is not None and not isinstance(written, dict):
        draft.wrong((section,), f"expected a mapping of keys, got {kind(written)}")
    given = written if isinstance(written, dict) else {}
    known_keys = schema.model_fields
    several = [
        key
        for key, value in given.items()
        if key in known_keys
        and (
            isinstance(value, dict)
            or (isinstance(value, list) and not fields.is_sequence(known_keys[key]))
        )
    ]
    for key in several:
        draft.wrong(
            (section, key),
            f"{section} holds no ranges or choices; expected one value, got {kind(given[key])}",
        )
    section_keys.section(
        draft, (section,), {k: v for k, v in given.items() if k not in several}, schema.model_fields
    )


def sharing(draft: Draft) -> None:
    """`gpus` and `per_gpu` say nothing where the device is no GPU, or one by its number, or where a cluster deals them out."""
    name, device, gpus, share = (
        draft.values.get(("engine", key)) for key in ("name", "device", "gpus", "per_gpu")
    )
    for key, default in (("gpus", None), ("per_gpu", 1)) if name == "ray" else ():
        if draft.values.get(("engine", key)) != default:
            draft.wrong(
                ("engine", key),
                f"Ray deals out the GPUs; drop {key}, and write gpus_per_trial for a part of one",
            )
    if gpus is not None and device not in ("auto", "cuda"):
        draft.wrong(
            ("engine", "gpus"),
            f"which GPUs is already said by device: {device}; keep one of the two, or write device: cuda",
        )
    if isinstance(share, int) and share > 1 and device in ("cpu", "mps"):
        draft.wrong(
            ("engine", "per_gpu"),
            f"is for GPUs, and device is {device}; for several workers write workers: {share}",
        )


def known(draft: Draft, what: str, path: tuple[str | int, ...], name: Any) -> None:
    """Whether a plug-in is there: a built-in one by its file, the user's own by importing it."""
    names = plugins.names(what)
    if not isinstance(name, str) or (":" not in name and name not in names):
        draft.wrong(
            path,
            f"{name!r} is not known{suggest(name, names)}; your own goes as package.module:attribute",
        )
    elif ":" in name:
        try:
            plugins.attribute(what, name)
        except SpaceError as error:
            draft.problems.extend(draft.doc.problem(path, problem) for problem in error.problems)


def foreign(draft: Draft) -> None:
    """Keys that mean nothing to the engine that is chosen; one at its default says nothing."""
    name = draft.values.get(("engine", "name"), "local")
    for key in RAY if name != "ray" and name in plugins.names("engine") else ():
        value = draft.values.get(("engine", key))
        if value != Engine.model_fields[key].default:
            draft.wrong(
                ("engine", key),
                f"{value!r}, but only the engine ray has this key; drop it, or write engine: {{name: ray, …}}",
            )


def study_name(draft: Draft) -> None:
    """The study's folder must be able to carry its name, whether written or taken from the file's."""
    written = draft.values.get(("search", "name"))
    name = Path(draft.doc.file).stem if written is None else written
    size = len(name.encode(errors="surrogateescape"))
    if size > MAX_NAME:
        draft.wrong(
            ("search", "name"),
            f"a study's name is a folder's name: at most {MAX_NAME} bytes, got {size}",
        )
    elif not name.isprintable() or name.startswith("."):
        draft.wrong(
            ("search", "name"), f"a study cannot be called {name!r}; write search: {{name: …}}"
        )


def metric(draft: Draft) -> None:
    """What is maximised: one of the task's metrics, its first where none is written."""
    task, written = draft.values.get(("task", "name")), draft.values.get(("search", "metric"))
    try:
        allowed = plugins.metrics(task) if isinstance(task, str) else ()
    except SpaceError:
        return  # what is wrong with the task is said there
    if written is None and allowed:
        draft.values["search", "metric"] = allowed[0]
    elif written is None and task is not None:
        draft.wrong(
            ("search", "metric"), f"is needed: {task} has no METRICS beside it to take the first of"
        )
    elif allowed and written not in allowed:
        draft.wrong(
            ("search", "metric"),
            f"{written!r} is not a metric of {task}{suggest(written, allowed)}",
        )


def database(draft: Draft) -> str | None:
    value = draft.doc.tree.get("storage")
    if value is not None and not isinstance(value, str):
        draft.wrong(
            ("storage",),
            f"expected a database URL such as postgresql://host/name, got {kind(value)}",
        )
        return None
    for problem in database_url.problems(value or ""):
        draft.wrong(("storage",), problem)
    return value


def export(draft: Draft) -> tuple[str, ...]:
    model = draft.values.get(("model", "name"))
    holds = plugins.stated(model, "EXPORTS", EXPORTS) if isinstance(model, str) else EXPORTS
    written = draft.doc.tree.get("export", [name for name in EXPORTS if name in holds])
    formats = [] if written is None else [written] if isinstance(written, str) else written
    if not isinstance(formats, list):
        draft.wrong(
            ("export",),
            f"expected a list of formats ({', '.join(plugins.names('export'))}), got {kind(formats)}",
        )
        return ()
    for i, name in enumerate(formats):
        known(draft, "export", ("export", i), name)
        if name in EXPORTS and name not in holds:
            draft.wrong(
                ("export", i), f"{name} cannot hold {model}; {fields.alternatives(holds)} can"
            )
    return tuple(dict.fromkeys(str(name) for name in formats))

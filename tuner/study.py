"""Studies in Python: what `tuner.run` and `tuner.Study` give. docs/python.md shows them at work.

`import tuner` loads neither torch nor Optuna; the first use of a name loads what it needs.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.commands.console import Console
from tuner.commands.study_view import StudyView, open_folder
from tuner.config import parsing
from tuner.config.objective import Direction
from tuner.config.requirements import pip_install
from tuner.config.space import dump_yaml
from tuner.config.yaml_document import Document, parse_document
from tuner.errors import DataError, Interrupted, SpaceError

if TYPE_CHECKING:
    import pandas

    from tuner.training.loaded_model import Model

PathLike = str | os.PathLike[str]
HERE = "dict"  # where messages say that a key of a mapping stands


@dataclass(frozen=True)
class Trial:
    """One trial of a study.

    `score` is its best on the validation examples, None before the first epoch ended; `scores` are
    all of them. `state` is complete, pruned, fail or running. `best_epoch` and `epochs` count from
    1; `seconds` is None while it runs; `reason` says why a trial ended early.
    """

    number: int
    state: str
    score: float | None
    params: Mapping[str, Any]
    scores: Mapping[str, float]
    best_epoch: int | None
    epochs: int
    seconds: float | None
    reason: str | None


class Study:
    """A study on the disk. Each question reads it anew, so a running study can be followed.

    Args:
        folder: The folder of the study, such as `studies/photos`.

    Raises:
        DataError: There is no study.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        if not (self.folder / "space.yaml").is_file():
            raise DataError(
                f"{self.folder}: no study there; `tuner.run` makes one, `tuner ls` lists those of "
                "this folder"
            )

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r})"

    @contextlib.contextmanager
    def _view(self) -> Iterator[StudyView]:
        with contextlib.closing(open_folder(self.folder)) as view:
            yield view

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def state(self) -> str:
        """`running`, `done` or `stopped`; `tuner.run` with the same space continues a stopped
        study.
        """
        with self._view() as view:
            return view.state

    @property
    def metric(self) -> str:
        with self._view() as view:
            return view.metric

    @property
    def direction(self) -> Direction:
        """`maximise` or `minimise`."""
        with self._view() as view:
            return view.direction

    @property
    def trials(self) -> list[Trial]:
        """All trials by number, repeats that confirmed the best ones included."""
        return [_trial(row) for row in self._rows()]

    @property
    def best(self) -> Trial:
        """The winner: the exported trial, or before there is an export the best one so far.

        Raises DataError where no trial completed.
        """
        from tuner.commands.trial_list import trial_values

        with self._view() as view:
            if view.published is not None:
                return _trial(trial_values(view.trial(int(view.published.manifest["trial"]))))
            if not view.ranked:
                raise DataError(f"study {self.name!r}: no trial completed yet")
            return _trial(trial_values(view.ranked[0]))

    @property
    def scores(self) -> Mapping[str, float]:
        """The scores of the exported model on the test examples. Raises DataError without one."""
        with self._view() as view:
            if view.published is None:
                raise DataError(f"study {self.name!r} has no export yet, so it was not tested")
            return view.published.manifest["scores"]["test"]  # type: ignore[no-any-return]

    def frame(self) -> "pandas.DataFrame":
        """A row for each trial, with columns `param.KEY` and `score.METRIC` beside those that are
        called as the fields of a trial. Raises SpaceError where pandas is missing.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise SpaceError(f"frame() needs pandas: {pip_install('pandas')}") from None
        return pandas.DataFrame(
            [
                {_RENAMED.get(name, name): v for name, v in row.items() if name not in _NESTED}
                | {f"param.{name}": value for name, value in row["params"].items()}
                | {f"score.{name}": value for name, value in row["scores"].items()}
                for row in self._rows()
            ]
        )

    def _rows(self) -> list[dict[str, Any]]:
        from tuner.commands.trial_list import trial_values

        with self._view() as view:
            return [trial_values(trial) for trial in view.trials]

    def report(self, out: PathLike | None = None, *, markdown: bool = False) -> Path:
        """Writes the report of `tuner report`, by default into the study's folder.

        Returns its path. Raises DataError, StorageError.
        """
        from tuner.commands.report import write_report

        with self._view() as view:
            return write_report(view, None if out is None else Path(out), markdown=markdown)

    def load(
        self, *, format: str | None = None, device: str = "auto", trust: bool = False
    ) -> "Model":
        """The exported model: `tuner.load` of this study."""
        from tuner.training.loaded_model import load

        return load(self.folder.resolve(), format=format, device=device, trust=trust)


_NESTED, _RENAMED = ("params", "scores", "curve"), {"value": "score"}


def _trial(row: Mapping[str, Any]) -> Trial:
    """A trial from what `tuner trials --json` says of it."""
    names = ("number", "state", "params", "scores", "best_epoch", "epochs", "seconds", "reason")
    return Trial(score=row["value"], **{name: row[name] for name in names})


def run(
    space: PathLike | Mapping[str, Any],
    *,
    time: str | None = None,
    preset: str | None = None,
    read_as: str | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    studies: PathLike = "studies",
    quiet: bool = False,
) -> Study:
    """Searches, retrains the best recipe, tests it and exports it: `tuner run` in Python.

    The same call continues a study that was stopped, and does nothing where it is done.

    Args:
        space: Data (a folder, a table), for which a space file is written into the current folder
            as `tuner init` does; or a space file; or its content as a dict.
        time: How long the whole call may take, with retraining, test and export, such as `"1h"` or
            `"30m"`.
        preset: With data: `"quick"`, `"medium"` (the default) or `"best"`.
        read_as: With data that can be read in several ways: which one.
        settings: Keys of the space that differ, such as `{"search.trials": 5}`.
        name: The name of the study; None: that of the file or the data.
        studies: The folder that holds one folder per study.
        quiet: Print nothing but warnings.

    Returns:
        The study, done.

    Raises:
        SpaceError: What was given is not understood; every problem is listed.
        DataError: The data or weights cannot be used.
        StorageError: Disk, database or device.
        NoUsableTrial: The search ended without a model.
        Interrupted: By Ctrl-C; the same call continues.
    """
    from tuner.commands.run import run_study
    from tuner.commands.session import Folders, home_folder

    console = Console("quiet" if quiet else "normal")
    changes = dict(settings or {})
    if time is not None:
        changes["search.time"] = time
    if name is not None:
        changes["search.name"] = name
    parsed = parsing.parse_space(
        parsing.apply_overrides(
            _document(space, preset, read_as, time, quiet=quiet),
            [f"{key}={_override_text(key, value)}" for key, value in changes.items()],
        )
    )
    folders = Folders(Path(studies), home_folder(console.warn))
    try:
        summary = run_study(parsed, folders, console)
    except Interrupted as error:
        problem = "interrupted; the same call of tuner.run continues where it stopped"
        raise Interrupted(error.code - 128, problem) from None
    console.print_summary(summary)
    return Study(summary.folder)


def _value_text(key: str, value: Any) -> str:
    """A value as JSON. Raises SpaceError."""
    try:
        return json.dumps(value, default=os.fspath, ensure_ascii=False)
    except TypeError:
        raise SpaceError(
            f"settings: {key}: a {type(value).__name__} has no place in a space; use numbers, "
            "texts, lists and dicts"
        ) from None


def _override_text(key: str, value: Any) -> str:
    """A value as an override spells it: JSON is YAML, but for its escapes of characters beyond
    U+FFFF, which are two halves, and for separators of lines. Raises SpaceError.
    """
    text = _value_text(key, value)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _document(
    space: PathLike | Mapping[str, Any],
    preset: str | None,
    read_as: str | None,
    time: str | None,
    *,
    quiet: bool,
) -> Document:
    """What was given, as a document."""
    from tuner.commands.arguments import check_preset
    from tuner.commands.init import is_data, space_file_of
    from tuner.config import yaml_document

    if not isinstance(space, Mapping) and is_data(Path(space)):
        wanted = None if preset is None else check_preset(preset)
        with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
            space = space_file_of(Path(space), wanted, read_as, time)
    elif preset is not None or read_as is not None:
        raise SpaceError("preset and read_as are for data; this space says itself what is searched")
    if isinstance(space, Mapping):
        return _document_of(space)
    return yaml_document.read_document(Path(space))


def _document_of(space: Mapping[str, Any]) -> Document:
    """A dict as a document, with the checks that a file gets."""
    content = json.loads(_value_text("", dict(space)))
    document = parse_document(dump_yaml(content), HERE)
    data = document.content.get("data")
    options = data if isinstance(data, dict) else {"name": data}
    named = str(options.get("path") or options.get("name") or HERE)
    # the study is called as its data are, and problems name the keys alone
    document.file = f"{Path(named).stem}.yaml"
    document.lines = {(): HERE}
    return document

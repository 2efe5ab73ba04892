"""`tuner init`: a space file for some data, or one of the examples that come with the package."""

import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tuner.commands.session import home_folder
from tuner.errors import DataError, SpaceError, suggest_names
from tuner.files.atomic import disk_errors

if TYPE_CHECKING:
    from tuner.commands.data_scan import DataReading

FOLDER = Path(__file__).parents[1] / "search_spaces"
WEIGHT_HOSTS = ("https://huggingface.co", "https://download.pytorch.org")
NETWORK_SECONDS = 3.0
TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".txt", ".parquet")


def carry_out(
    name: str | None,
    example: bool,
    out: Path | None,
    preset: str,
    as_: str | None,
    time: str | None = None,
) -> None:
    """Lists the examples, writes the named one here, or writes a space file for some data."""
    if name is None:
        for known, line in list_examples():
            typer.echo(f"{known:<17} {line}")
        typer.echo("\n`tuner init --example NAME` writes one into this folder")
        typer.echo("`tuner init DATA` writes a space file for a folder or a file of yours")
    elif not example and (Path(name).expanduser().exists() or name not in names()):
        written = write_space(name, out, preset, as_, time)
        typer.echo(f"change it as you like, then `tuner run {written}`")
    elif not example:
        raise SpaceError(f"to write an example here: `tuner init --example {name}`")
    else:
        file = write_example(name, out or Path(f"{name}.yaml"))
        typer.echo(f"wrote {file}; change what it says of your data, then `tuner check {file}`")


def write_space(
    data: str, out: Path | None, preset: str, as_: str | None, time: str | None = None
) -> Path:
    """Writes a space file for a folder or file of data, and says what was seen.

    Raises DataError where it is no data or a class has no image, SpaceError where it can be read in
    several ways, or the file is there already.
    """
    from tuner.commands.space_proposal import Machine, explain_model, format_space

    reading = choose_reading(data, as_)
    if reading.empty_classes:
        raise DataError(
            f"{data}: no image in {', '.join(map(repr, reading.empty_classes))}; each folder is a "
            "class: add images or remove the folders"
        )
    home = home_folder(lambda text: print(f"tuner: warning: {text}", file=sys.stderr))
    machine = Machine(has_gpu(), can_download(), home)
    file = out or default_file(data)
    write_new(file, format_space(reading, machine, preset, time))
    typer.echo(f"{data}: {reading.description}")
    if why := explain_model(reading.task, machine):
        typer.echo(f"model   {why}")
    typer.echo(f"wrote {file} (preset {preset})")
    return file


def default_file(data: str) -> Path:
    """Where the space file of some data is written: its name in the current folder."""
    path = Path(data).expanduser().resolve()
    return Path(f"{(path.name if path.is_dir() else path.stem) or 'data'}.yaml")


def choose_reading(data: str, as_: str | None) -> "DataReading":
    """The one way in which data are read.

    Raises DataError where it is no data, SpaceError where it can be read in several ways.
    """
    from tuner.commands.data_scan import scan_data
    from tuner.commands.unknown_data import explain_unreadable

    by_label = {reading.label: reading for reading in scan_data(data)}
    if not by_label:
        raise DataError(explain_unreadable(data))
    return by_label[choose_label(data, list(by_label), as_)]


def choose_label(data: str, labels: list[str], as_: str | None) -> str:
    """The way in which data are read: the only one, the one of `--as`, or the one that is asked
    for on a terminal. Raises SpaceError.
    """
    if as_ is not None:
        if as_ not in labels:
            raise SpaceError(f"--as {as_!r}: {data} cannot be read so{suggest_names(as_, labels)}")
        return as_
    if len(labels) == 1:
        return labels[0]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise SpaceError(
            f"{data} can be read in {len(labels)} ways: {', '.join(labels)}; choose one with --as"
        )
    for number, label in enumerate(labels, 1):
        typer.echo(f"{number}  {label}")
    chosen: int = typer.prompt("as which of these", type=int)
    if not 1 <= chosen <= len(labels):
        raise SpaceError(f"{chosen} is not one of 1 to {len(labels)}")
    return labels[chosen - 1]


def is_data(path: Path) -> bool:
    """Whether what `tuner run` was given is data and not a space file."""
    return path.is_dir() or (path.is_file() and path.suffix.lower() in TABLE_SUFFIXES)


def space_file_of(data: Path, preset: str | None, as_: str | None, time: str | None = None) -> Path:
    """The space file of some data for `tuner run DATA`: written at the first time, used later.

    With a time it has no number of trials.

    Raises SpaceError where a file of that name is about something else, DataError.
    """
    from tuner.config import yaml_document

    file = default_file(str(data))
    if not file.exists():
        return write_space(str(data), file, preset or "medium", as_, time)
    if preset is not None or as_ is not None:
        raise SpaceError(
            f"{file} is there already, so --preset and --as are not used; `tuner run {file}` goes "
            "on with it, and without that file it is written anew"
        )
    content = yaml_document.read_document(file).content
    section = content.get("data") if isinstance(content, dict) else None
    if not isinstance(section, dict) or section.get("path") != str(data):
        raise SpaceError(
            f"{file} is there already and not about {data}; write another with "
            f"`tuner init {data} -o FILE`"
        )
    return file


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def can_download() -> bool:
    """Whether the hosts of weights answer within some seconds."""
    for host in WEIGHT_HOSTS:
        request = urllib.request.Request(host, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=NETWORK_SECONDS):
                pass
        except urllib.error.HTTPError:
            continue  # it answers
        except (OSError, ValueError):
            return False
    return True


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def list_examples() -> list[tuple[str, str]]:
    """Each example's name, and the line that says what it is for: the first of its file."""
    return [(name, _read(name).partition("\n")[0].lstrip("# ")) for name in names()]


def write_example(name: str, path: Path) -> Path:
    """The example as a file at this path.

    Raises SpaceError on an unknown name, and where such a file is there already.
    """
    if name not in names():
        raise SpaceError(f"no example is called {name!r}{suggest_names(name, names())}")
    # the commands in its comments name the file where it lies now
    write_new(path, _read(name).replace(f"search_spaces/{name}.yaml", str(path)))
    return path


def write_new(path: Path, text: str) -> None:
    """Writes a file that is not there yet. Raises SpaceError where it is, StorageError."""
    with disk_errors(path):
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise SpaceError(
                f"{path.name} is there already and stays as it is; rename it, or go to another "
                "folder"
            ) from None
        except FileNotFoundError:
            raise SpaceError(f"{path.parent} is no folder; make it, or write elsewhere") from None
        with file:
            file.write(text)


def _read(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")

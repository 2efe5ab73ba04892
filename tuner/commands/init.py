"""`tuner init`: the space files that come with the package, as examples to begin with."""

from pathlib import Path

import typer

from tuner.errors import SpaceError, suggest_names
from tuner.files.atomic import disk_errors

FOLDER = Path(__file__).parents[1] / "search_spaces"


def carry_out(name: str | None, example: bool) -> None:
    """Lists the examples, or writes the named one into the current folder."""
    if name is None:
        for known, line in list_examples():
            typer.echo(f"{known:<17} {line}")
        typer.echo("\n`tuner init --example NAME` writes one into this folder")
    elif not example:
        raise SpaceError(f"to write an example here: `tuner init --example {name}`")
    else:
        file = write_example(name, Path.cwd()).name
        typer.echo(f"wrote {file}; change what it says of your data, then `tuner check {file}`")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def list_examples() -> list[tuple[str, str]]:
    """Each example's name, and the line that says what it is for: the first of its file."""
    return [(name, _read(name).partition("\n")[0].lstrip("# ")) for name in names()]


def write_example(name: str, folder: Path) -> Path:
    """The example as a file in this folder.

    Raises SpaceError on an unknown name, and where such a file is there already.
    """
    if name not in names():
        raise SpaceError(f"no example is called {name!r}{suggest_names(name, names())}")
    path = folder / f"{name}.yaml"
    # the commands in its comments name the file where it lies now
    text = _read(name).replace(f"search_spaces/{name}.yaml", path.name)
    with disk_errors(path):
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise SpaceError(
                f"{path.name} is there already and stays as it is; rename it, or go to another "
                "folder"
            ) from None
        with file:
            file.write(text)
    return path


def _read(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")

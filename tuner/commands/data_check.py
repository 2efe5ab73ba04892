"""`tuner check --data`: what is there in some data, and what is wrong with them.

What is certainly wrong is a fault, and the command ends with the code of a DataError: images that
cannot be read, an example in two splits, an example under two classes. Everything else is a note.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tuner.commands.data_findings import Finding, check_lines, check_values, find_problems
from tuner.commands.init import choose_reading, default_file, has_gpu, is_data
from tuner.commands.session import home_folder
from tuner.config import parsing, yaml_document
from tuner.config.engine_settings import EngineSettings
from tuner.config.run import Run
from tuner.errors import DataError, StorageError
from tuner.files.atomic import atomic_path
from tuner.files.removal import begins_with

if TYPE_CHECKING:
    from tuner.training.data_check import CheckedData

PAGE_HEADER = "<!-- tuner's check of data "


def check_data(
    path: Path, overrides: Sequence[str], out: Path | None, as_: str | None, *, as_json: bool
) -> None:
    """Examines data, prints what was found and writes a page.

    Raises:
        DataError: The data cannot be read, or something in them is certainly wrong.
        SpaceError: The file or an option is wrong.
        StorageError: The page cannot be written.
    """

    def warn(text: str) -> None:
        print(f"tuner: warning: {text}", file=sys.stderr)

    page = out or default_file(str(path)).with_suffix(".data.html")
    require_own_page(page)
    home = home_folder(warn)
    run = find_run(path, overrides, as_, home)

    from tuner.training.data_check import examine_data
    from tuner.training.devices import select_device

    data = examine_data(run, select_device(EngineSettings(), home))
    findings = find_problems(data)
    write_page(page, str(path), data, findings)
    if as_json:
        typer.echo(json.dumps(check_values(str(path), data, findings) | {"page": str(page)}))
    else:
        for line in check_lines(str(path), data, findings):
            typer.echo(line)
        typer.echo(f"wrote    {page}")
    faults = [f"{path}: {finding.text}" for finding in findings if finding.is_fault]
    if faults:
        raise DataError(*faults)


def find_run(path: Path, overrides: Sequence[str], as_: str | None, home: Path) -> Run:
    """The run whose data are examined: the first that a space file can have, or what `tuner init`
    proposes for the data without network. Raises DataError, SpaceError.
    """
    if not is_data(path):
        space = parsing.load_space(path, overrides)
        return next(iter(space.plugin_combinations()))
    from tuner.commands.space_proposal import Machine, format_space

    reading = choose_reading(str(path), as_)
    text = format_space(reading, Machine(has_gpu(), False, home), "medium")
    document = parsing.apply_overrides(yaml_document.parse_document(text, str(path)), overrides)
    return next(iter(parsing.parse_space(document).plugin_combinations()))


def require_own_page(page: Path) -> None:
    """Raises StorageError where a page has no folder, or would replace a file of another kind."""
    if not page.parent.is_dir():
        raise StorageError(f"{page}: {page.parent} is no folder; make it, or write elsewhere")
    if page.exists() and not begins_with(page, PAGE_HEADER):
        raise StorageError(f"{page} is no page of `tuner check`; name another with --out")


def write_page(page: Path, name: str, data: "CheckedData", findings: list[Finding]) -> None:
    """Raises StorageError."""
    from tuner.commands.data_check_page import format_page

    with atomic_path(page) as temporary:
        temporary.write_text(format_page(name, data, findings), encoding="utf-8", errors="replace")


# -- what is wrong

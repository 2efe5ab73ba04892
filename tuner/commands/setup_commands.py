"""The command line of what needs no study: arguments and options, and nothing else.

What a command does is in a module of its own, imported when the command runs.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.arguments import (
    As,
    Debug,
    FileOrData,
    Json,
    Overrides,
    PresetOption,
    Studies,
    TimeOption,
    check_preset,
    check_time,
)
from tuner.errors import SpaceError


def init(
    name: Annotated[
        str | None,
        typer.Argument(
            help="a folder or file of data; with --example the name of an example; "
            "without one, the examples are listed",
            metavar="DATA",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="default: DATA.yaml in this folder", metavar="FILE"),
    ] = None,
    preset: PresetOption = "medium",
    as_: As = None,
    time: TimeOption = None,
    example: Annotated[
        bool, typer.Option("--example", help="write the example of this name here, to be changed")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a space file for your data, or list the examples and write one.

    The file runs as it is: its keys follow from the data and this machine.
    """
    from tuner.commands.init import carry_out

    carry_out(name, example, out, check_preset(preset), as_, check_time(time) if time else None)


def plan(
    file: FileOrData,
    overrides: Overrides = None,
    preset: PresetOption = "medium",
    as_: As = None,
    studies: Studies = Path("studies"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Say how long a search will take, and what it needs, from some steps at each freeze depth.

    Given a folder or file of data, it writes a space file for it first, as `tuner init` does.
    """
    began = time.monotonic()
    from contextlib import nullcontext, redirect_stdout

    from tuner.commands.console import Console
    from tuner.commands.init import is_data, space_file_of
    from tuner.commands.plan import print_plan
    from tuner.commands.session import Folders, home_folder
    from tuner.config import parsing

    if is_data(file):
        with redirect_stdout(sys.stderr) if json_ else nullcontext():
            wanted = None if preset == "medium" else check_preset(preset)
            file = space_file_of(file, wanted, as_)
    space = parsing.load_space(file, overrides or ())
    console = Console("quiet")
    folders = Folders(studies, home_folder(console.warn))
    print_plan(space, folders, console, began, as_json=json_)


def doctor(studies: Studies = Path("studies"), json_: Json = False, debug: Debug = False) -> None:
    """Show versions, devices, disks and extras, and what a search would use."""
    from tuner.commands.doctor import examine

    examine(studies, as_json=json_)


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            help="a model, or your own: package.module:attribute; or a pattern such as "
            "'timm/*dinov2*'",
            metavar="NAME",
        ),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="a folder or file of data: score models on a sample of it, by one forward pass "
            "each",
            metavar="DATA",
        ),
    ] = None,
    among: Annotated[
        str | None,
        typer.Option(
            help="with --for: the models to score, as names and patterns with commas between; "
            "default: some of each kind",
            metavar="PATTERN",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="with --for: weights of your own for a model; may be repeated",
            metavar="MODEL=FILE",
        ),
    ] = None,
    time: Annotated[
        str,
        typer.Option(
            help="with --for: after so long no further model is begun", metavar="DURATION"
        ),
    ] = "10m",
    write: Annotated[
        Path | None,
        typer.Option(
            help="with --for: a new space file that searches the best models and the one that is "
            "strongest in general",
            metavar="FILE",
        ),
    ] = None,
    as_: As = None,
    debug: Debug = False,
) -> None:
    """List the models or those of a pattern; show what freezing one saves, or which suit some data.

    With --for they are scored by one forward pass over a sample: an estimate, without fine-tuning.
    """
    from tuner.config import plugins

    if for_ is not None:
        from tuner.commands.model_choice import choose_models

        if name is not None:
            raise SpaceError(f"{name}: with --for the models are named by --among")
        choose_models(for_, among, time, weights or (), as_, write)
        return
    given = {"--among": among, "--weights": weights, "--write": write, "--as": as_}
    for option in (option for option, value in given.items() if value):
        raise SpaceError(f"{option} is for scoring models on data; give the data with --for")
    if name is None:
        typer.echo("\n".join(plugins.list_names("model")))
        return
    from tuner.training.model_summary import (
        describe_models,
        find_models,
        shorten_stages,
        summarize_model,
    )

    if "*" in name or "?" in name:
        names = find_models(name)
        width = max(map(len, names))
        typer.echo(f"{'model':<{width}}  parameters   size  depths  stages")
        for line in describe_models(names):
            stages = shorten_stages(line.stages)
            typer.echo(
                f"{line.name:<{width}}  {line.parameters / 1e6:>8.2f} M  {line.size:>5}  "
                f"{len(line.stages) - 1:>6}  {stages}"
                + (f" ({line.uncut_reason})" if line.uncut_reason else "")
            )
        return
    summary = summarize_model(name)
    size = f"{summary.parameters / 1e6:.2f} M parameters, {summary.flops / 1e9:.3f} GFLOPs"
    typer.echo(f"{name}: {size} a {summary.example} (1000 classes)")
    typer.echo("depth  frozen up to    parameters  FLOPs")
    for d in summary.depths:
        typer.echo(f"{d.depth:>5}  {d.stage:<14}  {d.parameters:>9.1%}  {d.flops:>5.1%}")
    if summary.uncut_reason:
        typer.echo(f"It is not cut further: {summary.uncut_reason}.")


def schema() -> None:
    """Print the JSON schema of space files, for editors."""
    from tuner.config.json_schema import space_schema as build

    typer.echo(json.dumps(build(), indent=2))

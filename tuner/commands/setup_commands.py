"""The command line of what needs no study: arguments and options, and nothing else.

What a command does is in a module of its own, imported when the command runs.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.arguments import As, Debug, Json, PresetOption, Studies, check_preset


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
    example: Annotated[
        bool, typer.Option("--example", help="write the example of this name here, to be changed")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a space file for your data, or list the examples and write one.

    Task, model, pixels and ranges follow from the data and this machine. It runs as it is.
    """
    from tuner.commands.init import carry_out

    carry_out(name, example, out, check_preset(preset), as_)


def doctor(studies: Studies = Path("studies"), json_: Json = False, debug: Debug = False) -> None:
    """Show versions, devices, disks and extras, and what a search would use."""
    from tuner.commands.doctor import examine

    examine(studies, as_json=json_)


def models(
    name: Annotated[
        str | None,
        typer.Argument(help="a model, or your own: package.module:attribute", metavar="NAME"),
    ] = None,
    debug: Debug = False,
) -> None:
    """List the models, or what each freeze depth of one saves."""
    from tuner.config import plugins

    if name is None:
        typer.echo("\n".join(plugins.list_names("model")))
        return
    from tuner.training.model_summary import summarize_model

    summary = summarize_model(name)
    size = f"{summary.parameters / 1e6:.2f} M parameters, {summary.flops / 1e9:.3f} GFLOPs"
    typer.echo(f"{name}: {size} a {summary.example} (1000 classes)")
    typer.echo("depth  frozen up to    parameters  FLOPs")
    for d in summary.depths:
        typer.echo(f"{d.depth:>5}  {d.stage:<14}  {d.parameters:>9.1%}  {d.flops:>5.1%}")


def schema() -> None:
    """Print the JSON schema of space files, for editors."""
    from tuner.config.json_schema import space_schema as build

    typer.echo(json.dumps(build(), indent=2))

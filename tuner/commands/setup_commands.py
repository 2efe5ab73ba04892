"""The command line of what needs no study: arguments and options, and nothing else.

What a command does is in a module of its own, imported when the command runs.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.arguments import (
    As,
    Debug,
    Json,
    PresetOption,
    Studies,
    TimeOption,
    check_preset,
    check_time,
)


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
    debug: Debug = False,
) -> None:
    """List the models, those that match a pattern, or what each freeze depth of one saves."""
    from tuner.config import plugins

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

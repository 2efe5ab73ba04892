"""What several commands take on the command line, and how their help shows it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tuner.config.durations import parse_duration
from tuner.errors import SpaceError, suggest_names


class Command(TyperCommand):
    """A command whose help names what to write, without the types of Python."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [
            piece.translate({ord("{"): "", ord("}"): ""})
            for piece in super().collect_usage_pieces(ctx)
        ]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            records = [
                p.get_help_record(ctx) for p in self.get_params(ctx) if p.param_type_name == kind
            ]
            rows = [(names.partition(" <")[0], text) for names, text in filter(None, records)]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


File = Annotated[Path, typer.Argument(help="a space file; `tuner init` writes one", metavar="FILE")]
FileOrData = Annotated[
    Path,
    typer.Argument(help="a space file, or data for which one is written", metavar="FILE_OR_DATA"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="keys to set, such as recipe.lr=0.01 search.trials=5", metavar="KEY=VALUE"),
]
Studies = Annotated[
    Path, typer.Option(help="the folder that holds one folder per study", metavar="FOLDER")
]
Flips = Annotated[
    bool | None,
    typer.Option(
        "--flips/--no-flips",
        help="average each image with its mirror image; default: as the export was tested",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="print nothing but errors, warnings and addresses")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object a line")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda; auto: a GPU where there is one")
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="on 127.0.0.1; 0 takes a free one", metavar="N")
]
Study = Annotated[str, typer.Argument(help="a study's name", metavar="STUDY")]
StudyOrExport = Annotated[
    str, typer.Argument(help="a study's name, or an export's folder", metavar="STUDY_OR_EXPORT")
]
OneFormat = Annotated[
    str | None, typer.Option("--format", help="which export to use", metavar="FORMAT")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="import and run the code that the export names")
]
Batch = Annotated[
    int,
    typer.Option("--batch", min=1, max=4096, help="how many are computed at a time", metavar="N"),
]
LatestStudy = Annotated[
    str | None, typer.Argument(help="a study's name; default: the latest", metavar="STUDY")
]
PRESETS = ("quick", "medium", "best")
PresetOption = Annotated[
    str, typer.Option("--preset", help="how thorough: quick, medium or best", metavar="PRESET")
]
As = Annotated[
    str | None,
    typer.Option(
        "--as", help="how to read data that can be read in several ways", metavar="READING"
    ),
]


TimeOption = Annotated[
    str | None,
    typer.Option(
        "--time",
        help="how long the whole command takes, with retraining and export: 30m, 2h",
        metavar="TIME",
    ),
]


def check_time(text: str) -> str:
    """A duration. Raises SpaceError on any other text."""
    try:
        parse_duration(text)
    except ValueError as error:
        raise SpaceError(f"--time {text!r}: {error}") from None
    return text


def check_preset(name: str) -> str:
    """The name of a preset. Raises SpaceError on any other."""
    if name not in PRESETS:
        raise SpaceError(f"--preset {name!r} is not known{suggest_names(name, PRESETS)}")
    return name

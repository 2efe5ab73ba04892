"""The commands. Only what a command needs is imported, so that `tuner --help` answers at once."""

import io
import os
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import tuner
from tuner.commands import arguments, model_commands, setup_commands, study_commands
from tuner.commands.arguments import (
    As,
    Command,
    Debug,
    File,
    FileOrData,
    Json,
    Overrides,
    Port,
    Quiet,
    Studies,
    TimeOption,
    check_preset,
    check_time,
)
from tuner.commands.error_messages import print_error, refuse_windows, report_bug
from tuner.errors import SpaceError, TunerError

if TYPE_CHECKING:
    from tuner.commands.console import Console
    from tuner.commands.session import Folders
    from tuner.config.space import Space

app = typer.Typer(
    name="tuner",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tuner {tuner.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """Hyperparameter search for fine-tuning pretrained models.

    YAML and labelled data in; the best model out, retrained, tested, exported and verified.
    """


@app.command(cls=Command)
def run(
    file: FileOrData,
    overrides: Overrides = None,
    studies: Studies = Path("studies"),
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="serve the dashboard while the search runs")
    ] = False,
    port: Port = 8080,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", help="with data: quick, medium (the default) or best", metavar="PRESET"
        ),
    ] = None,
    as_: As = None,
    time_: TimeOption = None,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Search, retrain the best, test it, export it. The same command continues a study.

    Given a folder or file of data, it writes a space file for it first, as `tuner init` does.
    """
    began = time.monotonic()
    from tuner.commands.init import is_data, space_file_of
    from tuner.commands.run import run_study

    if time_ is not None:
        overrides = [*(overrides or ()), f"search.time={check_time(time_)}"]
    if is_data(file):
        wanted = None if preset is None else check_preset(preset)
        with redirect_stdout(sys.stderr) if quiet or json_ else nullcontext():
            file = space_file_of(file, wanted, as_, time_)
    elif preset is not None or as_ is not None:
        raise SpaceError(f"--preset and --as are for data; {file} says itself what is searched")

    space, folders, console = open_space(file, overrides, studies, quiet, json_)
    server = None
    if dashboard:
        from tuner.commands.dashboard_process import start_dashboard

        server = start_dashboard(space, folders, port, console)
    try:
        summary = run_study(space, folders, console, began)
        console.print_summary(summary)
    finally:
        if server is not None:
            server.terminate()
            server.wait()


@app.command(cls=Command)
def check(
    file: FileOrData,
    overrides: Overrides = None,
    print_: Annotated[
        bool, typer.Option("--print", help="print the whole file with its defaults")
    ] = False,
    data: Annotated[
        bool,
        typer.Option(
            "--data",
            help="examine the data and write a page: counts, sizes, unreadable and odd files, "
            "duplicates, leaks between splits, labels that a linear probe doubts",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="with --data: the page; default: NAME.data.html", metavar="FILE"
        ),
    ] = None,
    as_: As = None,
    studies: Studies = Path("studies"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Find what can be wrong before training. Nothing is downloaded.

    With --data it exits with 3 where something is certainly wrong, with 0 where only doubts are.
    """
    from tuner.commands.data_check import check_data
    from tuner.commands.earlier_studies import read_earlier_studies
    from tuner.commands.init import is_data
    from tuner.commands.session import open_session
    from tuner.commands.tracking import require_trackers
    from tuner.config.related_tasks import output_word
    from tuner.config.space import dump_yaml

    if data:
        check_data(file, overrides or (), out, as_, as_json=json_)
        return
    for option in [o for o, v in {"--out": out, "--as": as_, "--json": json_}.items() if v]:
        raise SpaceError(f"{option} is for examining data; add --data")
    if is_data(file):
        raise SpaceError(
            f"{file} is data; examine it with `tuner check {file} --data`, or write a space file "
            f"for it with `tuner init {file}`"
        )

    space, folders, console = open_space(file, overrides, studies, False, False)
    require_trackers(space)
    with open_session(space, folders, console, engine="inline") as s:
        survey = s.survey_models()
        facts = s.inspect_data(allow_downloads=False)
        read_earlier_studies(s, facts.digest)
    if print_:
        typer.echo(dump_yaml(space.to_dict()), nl=False)
        return
    sizes = ", ".join(f"{n:,} {part}" for part, n in facts.split_sizes.items())
    depths = ", ".join(
        f"{name} freeze depth 0..{depth}" for name, depth in survey.max_depths.items()
    )
    word = output_word(str(space.values["task", "name"]))
    examples = f"{sizes} examples of {len(facts.classes)} {word}"
    searched = len({d.path for d in space.dimensions})
    typer.echo(f"ok: {searched} searched keys; {examples}; {depths}")


@app.command(cls=Command)
def train(
    file: File,
    overrides: Overrides = None,
    studies: Studies = Path("studies"),
    out: Annotated[
        Path | None,
        typer.Option(help="where to export; default: STUDIES/NAME/train", metavar="FOLDER"),
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Train, test and export one run, such as a study's best.yaml."""
    from tuner.commands.export import show_published
    from tuner.commands.run import check_free_space
    from tuner.commands.session import INSTEAD, open_session, study_name
    from tuner.files.removal import require_target
    from tuner.messages import OutputSettings

    space, folders, console = open_space(file, overrides, studies, quiet, json_)
    if space.dimensions:
        names = ", ".join(dict.fromkeys(d.key for d in space.dimensions))
        raise SpaceError(
            f"{file}: {names} still to be chosen; search with `tuner run {file}`, or set them: "
            f"{'.'.join(space.dimensions[0].path)}=…"
        )
    folder = out or studies / study_name(space) / "train"
    require_target(folder, INSTEAD)
    with open_session(space, folders, console) as s:
        s.survey_models()
        check_free_space(folders, s.inspect_data())
        chosen = space.sample(None, seed=space.settings.search.seed)
        outputs = OutputSettings.of(space.settings.search)
        published = s.finalize(chosen, folder, space.settings.export, -1, {}, outputs=outputs)
    show_published(console, published)


@app.command(cls=Command)
def export(
    study: arguments.Study,
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="safetensors, torch_export, onnx, onnx_fp16, onnx_int8, openvino or pretrained; "
            "may be repeated",
            metavar="FORMAT",
        ),
    ] = None,
    trial: Annotated[
        int | None, typer.Option(help="another trial than the best; it is retrained", metavar="N")
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(
            help="the cheapest model whose validation score is so much below the best at most",
            metavar="SHARE",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="of --within: milliseconds, megabytes or parameters", metavar="COST"),
    ] = None,
    studies: Studies = Path("studies"),
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Export a study's best model, or another trial's."""
    from tuner.commands.export import export_trial, find_wanted_trial, show_published

    console = make_console(quiet, json_)
    trial = find_wanted_trial(studies, study, trial, within, by, console)
    show_published(console, export_trial(studies, study, tuple(format_ or ()), trial, console))


@app.command(cls=Command)
def dashboard(
    study: Annotated[
        str | None, typer.Argument(help="a study's name; default: the latest", metavar="STUDY")
    ] = None,
    studies: Studies = Path("studies"),
    port: Port = 8080,
    write: Annotated[
        bool, typer.Option("--write", help="allow changing and deleting from the browser")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve optuna-dashboard for a study on 127.0.0.1, read-only."""
    import optuna

    from tuner.dashboard import server as serving
    from tuner.search import storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = serving.find_study(studies, study)
    url = storage.stated(folder)
    mode = "can be changed in the browser" if write else "read-only"
    serving.serve(
        folder,
        url,
        port,
        allow_writes=write,
        announce=lambda page: typer.echo(f"study {folder.name}: {page}  ({mode}; Ctrl-C ends it)"),
    )


@app.command(cls=Command)
def clean(
    study: Annotated[
        str | None,
        typer.Argument(help="a study's name; may be left out with --cache", metavar="STUDY"),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="remove the whole study: trials, pictures, exports")
    ] = False,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache", help="remove the caches that studies share, but for what is being read"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what would be removed")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask before --all")] = False,
    studies: Studies = Path("studies"),
    debug: Debug = False,
) -> None:
    """Show what a study takes up, and remove its leftovers.

    These are checkpoints and what killed runs left.
    """
    from tuner.commands.clean import run_clean

    run_clean(studies, study, whole_study=all_, cache=cache, dry_run=dry_run, assume_yes=yes)


# in the order in which --help lists them, after those above
for command in (
    model_commands.predict,
    model_commands.test,
    model_commands.serve,
    study_commands.ls,
    study_commands.trials,
    study_commands.show,
    study_commands.compare,
    study_commands.report,
    study_commands.status,
    study_commands.stop,
    study_commands.enqueue,
    setup_commands.init,
    setup_commands.plan,
    setup_commands.models,
    setup_commands.doctor,
    setup_commands.schema,
):
    app.command(cls=Command)(command)


# -- shared by the commands


def make_console(quiet: bool, json_: bool) -> "Console":
    """For the commands that train: what they do is worth more than who reads what they print."""
    from tuner.commands.console import Console
    from tuner.commands.output import keep_streams

    console = Console("json" if json_ else "quiet" if quiet else "normal")
    keep_streams()
    return console


def open_space(
    file: Path, overrides: list[str] | None, studies: Path, quiet: bool, json_: bool
) -> "tuple[Space, Folders, Console]":
    """The space and where everything goes. The file is checked before any folder is made."""
    from tuner.commands.session import Folders, home_folder
    from tuner.config import parsing

    space = parsing.load_space(file, overrides or ())
    console = make_console(quiet, json_)
    return space, Folders(studies, home_folder(console.warn)), console


def main() -> NoReturn:
    """The command line; every error a line on stderr, and the exit code that its kind has."""
    if sys.platform == "win32":  # no fcntl, so most of tuner's modules cannot be imported
        sys.exit(refuse_windows())
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal without UTF-8 shows ? where it must, and nothing breaks
        sys.stdout.reconfigure(errors="replace")
    code = 0
    try:
        app()  # ends by SystemExit, with 2 for a usage error
    except TunerError as error:
        code = print_error(error, debug)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `tuner models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        code = report_bug(error, debug)
    sys.exit(code)

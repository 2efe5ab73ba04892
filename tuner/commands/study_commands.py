"""The command line of what looks at studies: arguments and options, and nothing else.

What a command does is in a module of its own, imported when the command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.arguments import Debug, Json, LatestStudy, Studies, Study
from tuner.errors import SpaceError


def ls(studies: Studies = Path("studies"), json_: Json = False, debug: Debug = False) -> None:
    """List the studies: state, trials, best score, test score, last change."""
    from tuner.commands.study_list import print_studies

    print_studies(studies, as_json=json_)


def trials(
    study: LatestStudy = None,
    csv_: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    best: Annotated[
        int | None, typer.Option(min=1, help="only the N best completed trials", metavar="N")
    ] = None,
    studies: Studies = Path("studies"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """List a study's trials: parameters, scores, times, and why some ended early."""
    from tuner.commands.study_view import open_view
    from tuner.commands.trial_list import print_trials

    if csv_ and json_:
        raise SpaceError("--csv and --json: choose one of them")
    form = "csv" if csv_ else "json" if json_ else "text"
    print_trials(open_view(studies, study), best, form)


def show(
    study: Study,
    trial: Annotated[int, typer.Argument(min=0, help="a trial's number", metavar="TRIAL")],
    yaml_: Annotated[
        bool, typer.Option("--yaml", help="print the file with which `tuner train` repeats it")
    ] = False,
    studies: Studies = Path("studies"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show one trial: parameters, learning curve, scores, reason, time, and how to repeat it."""
    from tuner.commands.study_view import open_view
    from tuner.commands.trial_page import print_trial

    if yaml_ and json_:
        raise SpaceError("--yaml and --json: choose one of them")
    print_trial(open_view(studies, study), trial, as_json=json_, as_yaml=yaml_)


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            help="names of studies; the others are compared with the first", metavar="STUDY"
        ),
    ],
    studies: Studies = Path("studies"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the winners of studies, example by example where the test examples are the same."""
    from tuner.commands.study_comparison import print_comparison

    print_comparison(studies, names, as_json=json_)


def report(
    study: LatestStudy = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="write Markdown instead of HTML")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="default: report.html in the study", metavar="FILE"),
    ] = None,
    studies: Studies = Path("studies"),
    debug: Debug = False,
) -> None:
    """Write what a study asked, found and cost as one HTML file that needs no network."""
    from tuner.commands.report import report_study

    report_study(studies, study, out, markdown=markdown)


def status(
    study: LatestStudy = None,
    studies: Studies = Path("studies"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show how far a study is, who runs it, and what its workers do."""
    from tuner.commands.running_study import print_status
    from tuner.commands.study_view import open_view

    print_status(open_view(studies, study), as_json=json_)


def stop(
    study: Study,
    now: Annotated[
        bool, typer.Option("--now", help="do not wait for the end of the running epoch")
    ] = False,
    studies: Studies = Path("studies"),
    debug: Debug = False,
) -> None:
    """Stop a running study from another shell, as Ctrl-C does; `tuner run` continues it."""
    from tuner.commands.running_study import stop_study
    from tuner.commands.study_view import open_view

    stop_study(open_view(studies, study), now=now)


def enqueue(
    study: Study,
    settings: Annotated[
        list[str],
        typer.Argument(help="searched keys, such as lr=3e-4 freeze_depth=5", metavar="KEY=VALUE"),
    ],
    studies: Studies = Path("studies"),
    debug: Debug = False,
) -> None:
    """Have a study try parameters of yours next; other keys have the default recipe's values."""
    from tuner.commands.running_study import enqueue_trial
    from tuner.commands.study_view import open_view

    enqueue_trial(open_view(studies, study), settings)

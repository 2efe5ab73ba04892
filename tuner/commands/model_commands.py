"""The command line of what is done with exported models: arguments and options, and nothing else.

What a command does is in a module of its own, imported when the command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.arguments import (
    Batch,
    Debug,
    Device,
    Flips,
    Json,
    OneFormat,
    Port,
    Studies,
    StudyOrExport,
    Trust,
)


def predict(
    study: StudyOrExport,
    examples: Annotated[
        list[str],
        typer.Argument(
            help="images, folders, globs; or texts, and files with one a line", metavar="EXAMPLE"
        ),
    ],
    format_: OneFormat = None,
    out: Annotated[
        Path,
        typer.Option(
            help="the folder for pictures of boxes, masks and heat maps", metavar="FOLDER"
        ),
    ] = Path("predictions"),
    csv_: Annotated[
        Path | None,
        typer.Option("--csv", help="write a table; only --explain draws pictures", metavar="FILE"),
    ] = None,
    least: Annotated[
        float | None,
        typer.Option(
            "--min",
            min=0,
            max=1,
            help="only answers of at least this probability or score; other examples are unsure",
            metavar="P",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="draw which parts of an image speak for its class")
    ] = False,
    batch: Batch = 16,
    trust: Trust = False,
    flips: Flips = None,
    device: Device = "auto",
    studies: Studies = Path("studies"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Apply an exported model to images or texts.

    It tells classes with probabilities, draws boxes and masks, labels or continues texts.
    """
    from tuner.commands.predict import PredictionOutput, print_predictions, require_other_file
    from tuner.training import inference

    require_other_file(csv_, examples)
    published = inference.find_export(studies, study)
    predictions = inference.predict_examples(
        published,
        examples,
        format_,
        device,
        trust=trust,
        flips=flips,
        batch_size=batch,
        explain=explain,
    )
    print_predictions(predictions, PredictionOutput(out, csv_, least, json_, explain))


def test(
    study: StudyOrExport,
    data: Annotated[
        str,
        typer.Argument(
            help="a folder or file of data that the study has not seen, with the truth",
            metavar="NEW_DATA",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="default: tested/STUDY/DATA in this folder", metavar="FOLDER"
        ),
    ] = None,
    format_: OneFormat = None,
    batch: Batch = 16,
    trust: Trust = False,
    flips: Flips = None,
    device: Device = "auto",
    studies: Studies = Path("studies"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Test an exported model with new data: scores with intervals, each class, what is wrong.

    It writes a page, a table of the wrong examples, and the scores as JSON.
    """
    from tuner.commands.new_data import TestSettings, run_test

    settings = TestSettings(format_, device, batch, trust, flips)
    run_test(studies, study, data, out, settings, as_json=json_)


def serve(
    study: StudyOrExport,
    port: Port = 8000,
    max_mb: Annotated[
        float, typer.Option(min=0.001, help="the most that a request may have", metavar="MB")
    ] = 20.0,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="the most that a request may take", metavar="S")
    ] = 30.0,
    format_: OneFormat = None,
    trust: Trust = False,
    flips: Flips = None,
    device: Device = "auto",
    studies: Studies = Path("studies"),
    debug: Debug = False,
) -> None:
    """Serve an exported model on 127.0.0.1: a page to drop a picture on, and JSON.

    POST /predict takes the bytes of an image, or a text as {"text": ...}.
    """
    from tuner.commands.serving import ServeSettings, serve_model

    serve_model(
        studies,
        study,
        port,
        ServeSettings(format_, device, trust, flips, max_mb, seconds),
        lambda page: typer.echo(f"{study}: {page}  (Ctrl-C ends it)"),
    )

"""`tuner predict`: what an exported model tells about each example, as lines or as JSON."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import typer

from tuner.errors import DataError
from tuner.training import inference


def print_predictions(
    predictions: Iterable[inference.NamedPrediction | str], folder: Path, *, as_json: bool
) -> None:
    """One line each; pictures are drawn into the folder.

    Raises DataError at the end if some examples cannot be read.
    """
    bad = 0
    for number, prediction in enumerate(predictions):
        if isinstance(prediction, str):
            bad += 1
            print(f"tuner: error: {prediction}", file=sys.stderr)
            continue
        picture = inference.write_picture(prediction, folder, number)
        if as_json:
            drawn = {"picture": str(picture)} if picture else {}
            line = {prediction.kind: prediction.name, **prediction.prediction.values, **drawn}
            typer.echo(json.dumps(line))
        else:
            arrow = f"  -> {picture}" if picture else ""
            typer.echo(f"{prediction.name}  {prediction.prediction.line}{arrow}")
    if bad:
        raise DataError(f"{bad} images cannot be read; the others were predicted")

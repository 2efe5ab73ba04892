"""`tuner predict`: what an exported model tells about each example, as lines, JSON or a table."""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import typer

from tuner.errors import DataError, SpaceError, StorageError, count_words
from tuner.files.atomic import disk_errors
from tuner.training import inference

UNSURE = "unsure"  # what a table says of an example without an answer that is sure enough
DIGITS = 6  # of probabilities and shares in a table


@dataclass(frozen=True)
class PredictionOutput:
    """Where predictions go.

    `folder` gets the pictures, `table` is a CSV file. `least`: answers below this probability or
    score are left out. `draws_beside_table`: pictures are drawn although a table is written.
    """

    folder: Path
    table: Path | None = None
    least: float | None = None
    as_json: bool = False
    draws_beside_table: bool = False


def print_predictions(
    predictions: Iterable[inference.NamedPrediction | str], output: PredictionOutput
) -> None:
    """One line each; pictures are drawn into the folder, unless a table is written.

    Raises DataError at the end if some examples cannot be read, StorageError.
    """
    bad, drawn = 0, 0
    with open_table(output.table) as table:
        for number, prediction in enumerate(predictions):
            if isinstance(prediction, str):
                bad += 1
                print(f"tuner: error: {prediction}", file=sys.stderr)
            elif table is not None:
                rows = table_rows(prediction, output.least)
                csv.writer(table, lineterminator="\n").writerows(rows)
                if output.draws_beside_table:
                    drawn += inference.write_picture(prediction, output.folder, number) is not None
            else:
                print_prediction(prediction, number, output)
    if output.table is not None and not output.as_json:
        pictures = f" and {count_words(drawn, 'picture', 'pictures')} in {output.folder}"
        typer.echo(f"wrote {output.table}{pictures if drawn else ''}")
    if bad:
        raise DataError(
            f"{count_words(bad, 'image', 'images')} cannot be read; the others were predicted"
        )


def require_other_file(table: Path | None, examples: Sequence[str]) -> None:
    """Raises SpaceError where the table would replace a file whose texts are to be predicted."""
    for example in examples if table is not None and table.exists() else ():
        if os.path.exists(example) and os.path.samefile(example, str(table)):
            raise SpaceError(
                f"--csv {table}: this file holds the examples, which would be lost; name another"
            )


@contextlib.contextmanager
def open_table(path: Path | None) -> Iterator[TextIO | None]:
    """The table as an open file with its header, which is written row by row; None without one."""
    if path is None:
        yield None
        return
    if not path.parent.is_dir():
        raise StorageError(f"{path}: {path.parent} is no folder; make it, or write elsewhere")
    with disk_errors(path), path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(["example", "answer", "score", "values"])
        yield file


def print_prediction(
    prediction: inference.NamedPrediction, number: int, output: PredictionOutput
) -> None:
    picture = inference.write_picture(prediction, output.folder, number)
    values = limit_values(prediction.prediction.values, output.least)
    if output.as_json:
        drawn = {"picture": str(picture)} if picture else {}
        typer.echo(json.dumps({prediction.kind: prediction.name, **values, **drawn}))
        return
    arrow = f"  -> {picture}" if picture else ""
    line = prediction.prediction.line
    if output.least is not None and "classes" in values:
        answer, score = best_answer(values)
        line = f"{answer} {score:.3f}" if score is not None else answer
    elif output.least is not None and "entities" in values:
        from tuner.tasks.token_classification import describe_entities

        line = describe_entities(values["entities"])
    typer.echo(f"{prediction.name}  {line}{arrow}")


def limit_values(values: Mapping[str, Any], least: float | None) -> dict[str, Any]:
    """The values without answers that are less sure than `least`."""
    if least is None:
        return dict(values)
    kept = dict(values)
    if "classes" in kept:
        kept["classes"] = {name: p for name, p in kept["classes"].items() if p >= least}
    if "objects" in kept:
        kept["objects"] = [one for one in kept["objects"] if one["score"] >= least]
    if "entities" in kept:
        kept["entities"] = [one for one in kept["entities"] if one["probability"] >= least]
    return kept


def best_answer(values: Mapping[str, Any]) -> tuple[str, float | None]:
    """The likeliest class with its probability; `unsure` without one."""
    name, probability = max(
        values["classes"].items(), key=lambda pair: pair[1], default=(UNSURE, None)
    )
    return str(name), probability


def table_rows(prediction: inference.NamedPrediction, least: float | None) -> Iterator[list[Any]]:
    """The rows of an example: its likeliest class with all probabilities; or a row for each object
    with its box, for each entity with its characters, or for each class with its share of the
    pixels; or the continuation of a text.
    """
    values = limit_values(prediction.prediction.values, least)
    name = prediction.name
    if "classes" in values:
        answer, score = best_answer(values)
        every = {c: round(p, DIGITS) for c, p in prediction.prediction.values["classes"].items()}
        rounded = None if score is None else round(score, DIGITS)
        yield [name, answer, rounded, json.dumps(every, ensure_ascii=False)]
    elif "objects" in values:
        for one in values["objects"]:
            yield [name, one["label"], round(one["score"], DIGITS), json.dumps(one["box"])]
    elif "entities" in values:
        for one in values["entities"]:
            place = json.dumps({key: one[key] for key in ("start", "end", "text")})
            yield [name, one["label"], round(one["probability"], DIGITS), place]
    elif "shares" in values:
        for label, share in values["shares"].items():
            if share > 0:
                yield [name, label, round(share, DIGITS), ""]
    else:
        text = values.get("continuation", prediction.prediction.line)
        yield [name, text, "", json.dumps(values, ensure_ascii=False)]

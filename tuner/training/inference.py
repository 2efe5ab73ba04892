"""Predictions by an export, for images, folders of images and globs, or for texts."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuner.config import plugins
from tuner.core.input_spec import (
    ImageInputSpec,
    InputSpec,
    TensorTree,
    TextInputSpec,
    input_spec_from_dict,
)
from tuner.core.output_modules import average_with_mirror, require_flips
from tuner.core.types import Prediction, Task
from tuner.errors import DataError, SpaceError, nearest_hint, suggest_names
from tuner.files.atomic import disk_errors
from tuner.files.removal import MANIFEST
from tuner.manifest import PublishedExport, read_export, replaced
from tuner.preprocessing.image_decoding import SUFFIXES, load_upright, silence_pillow, try_decode
from tuner.training.building import build_task
from tuner.training.exported_models import open_export, select_prediction_device

BATCH_SIZE = 16
PREFERRED_FORMATS = ("safetensors", "torch_export", "onnx")


@dataclass(frozen=True)
class NamedPrediction:
    """The prediction for one example."""

    kind: str  # image or text
    name: str  # the path of the image, or the text itself
    prediction: Prediction


def find_export(studies: Path, name: str) -> PublishedExport:
    """The export of a study, by the study's name or folder, or by the export's folder.

    Raises DataError.
    """
    for folder in (studies / name / "export", Path(name) / "export", Path(name)):
        # os.path, because Path.is_dir raises on a name that is too long
        published = read_export(folder) if os.path.isdir(folder) else None
        if published is not None:
            return published
    if os.path.isfile(studies / name / "space.yaml"):
        raise DataError(
            f"study {name!r} has no export yet; finish it with `tuner run`, or call "
            f"`tuner export {name}`"
        )
    known = sorted(p.parent.parent.name for p in studies.glob("*/export/manifest.json"))
    hint = suggest_names(name, known) if known else "; make one with `tuner run FILE`"
    raise DataError(
        f"no export under {name!r}: neither a study in {studies} nor a folder with "
        f"manifest.json{hint}"
    )


def find_images(patterns: Sequence[str]) -> list[Path]:
    """The images that paths, folders and globs name, in order, each once.

    Raises:
        DataError: A pattern names no image.
    """
    images: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        # an existing path is no glob, because its name may contain glob characters
        if os.path.lexists(path):
            matches = _images_below(path) if path.is_dir() else [path]
        else:
            matches = _images_of_glob(pattern)
        if not matches:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{pattern}: no image there{nearest_hint(path.name, siblings)}")
        images |= dict.fromkeys(matches)
    return list(images)


def _images_of_glob(pattern: str) -> list[Path]:
    """The images that a glob matches, and those in folders that it matches; all files where none is
    an image.
    """
    matches: list[Path] = []
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        matches += _images_below(path) if path.is_dir() else [path]
    return [path for path in matches if path.suffix.lower() in SUFFIXES] or matches


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())


def predict_examples(
    published: PublishedExport,
    examples: Sequence[str],
    export_format: str | None = None,
    device: str = "auto",
    *,
    trust: bool = False,
    flips: bool | None = None,
) -> Iterator[NamedPrediction | str]:
    """Predicts images or texts by an export.

    Args:
        published: The export.
        examples: Paths, folders and globs of images; or texts, and files with one text a line.
        export_format: The format to use; None: the first of PREFERRED_FORMATS that it has.
        device: Where it computes: auto, cpu or cuda.
        trust: Whether code that the export names may be imported and run.
        flips: Whether the outputs for each image and its mirror image are averaged; None: as the
            export was tested.

    Yields:
        A prediction for each example, or a sentence about an example that cannot be read.

    Raises:
        SpaceError: The format or the device is unknown, the format cannot use it, the export names
            code that is not trusted, or its task has no flips.
        StorageError: There is no such device.
        DataError: An example does not exist.
    """
    exports = published.manifest["exports"]
    available = [name for name in PREFERRED_FORMATS if name in exports] or list(exports)
    chosen = export_format or available[0]
    function, task, input_spec = open_predictor(
        published, chosen, select_prediction_device(device, chosen), trust=trust
    )
    if flips or (flips is None and published.manifest.get("test_flips")):
        require_flips(task, "--flips")
        function = average_with_mirror(function, task.mirror_output)
    if isinstance(input_spec, TextInputSpec):
        kind, batches = "text", encode_text_batches(read_texts(examples), input_spec)
    else:
        kind, batches = "image", read_image_batches(find_images(examples), input_spec)
    for batch in batches:
        yield from batch.problems
        if not batch.names:
            continue
        with torch.no_grad():
            predictions = task.describe_predictions(function, batch.x, batch.originals, input_spec)
        for name, prediction in zip(batch.names, predictions, strict=True):
            yield NamedPrediction(kind, name, prediction)


def require_format(published: PublishedExport, export_format: str) -> None:
    """Raises SpaceError where the export has no such format."""
    exports = published.manifest["exports"]
    if export_format not in exports:
        raise SpaceError(
            f"--format {export_format!r} was not exported{suggest_names(export_format, exports)}; "
            "make it with `tuner export`"
        )


def refuse_code(published: PublishedExport, export_format: str) -> None:
    """Raises SpaceError where the export names code that is not tuner's: another person may have
    made the export.
    """
    for key, name in published.code(export_format).items():
        raise SpaceError(
            f"{published.folder / MANIFEST}: {key}: {name!r} is code, which would be imported and "
            "run; if the export is your own, or you have read that code, add --trust (its module "
            "is found on PYTHONPATH, not in this folder)"
        )


def open_predictor(
    published: PublishedExport, export_format: str, device: torch.device, *, trust: bool
) -> tuple[Callable[[TensorTree], TensorTree], Task, InputSpec]:
    """The export as a function, its task and its input spec.

    Another process may replace the export while it is opened; then the new export is opened.
    """
    while True:
        require_format(published, export_format)
        if not trust:
            refuse_code(published, export_format)
        try:
            with plugins.installed_only():
                function = open_export(published, export_format, device)
                task = build_task(published.run, tuple(published.manifest["classes"]))
            input_spec = input_spec_from_dict(published.manifest["preprocess"], published.folder)
        except Exception:  # anything can fail where files of two exports are mixed
            newer = find_replacement(published)
            if newer is None:
                raise
        else:
            newer = find_replacement(published)
            if newer is None:
                return function, task, input_spec
        published = newer


def find_replacement(published: PublishedExport) -> PublishedExport | None:
    """The export that has replaced this one since it was read; None where none has."""
    return read_export(published.folder) if replaced(published) else None


@dataclass(frozen=True)
class ExampleBatch:
    """Some of the examples to predict; `problems` has a sentence for each that cannot be read."""

    names: list[str]
    x: TensorTree
    originals: list[Any]
    problems: list[str]


def read_image_batches(paths: Sequence[Path], input_spec: InputSpec) -> Iterator[ExampleBatch]:
    """The images in batches of BATCH_SIZE."""
    assert isinstance(input_spec, ImageInputSpec)
    for start in range(0, len(paths), BATCH_SIZE):
        batch = ExampleBatch([], torch.empty(0), [], [])
        pixels = []
        with silence_pillow():
            for path in paths[start : start + BATCH_SIZE]:
                image = try_decode(path, input_spec)
                if isinstance(image, str):
                    batch.problems.append(image)
                else:
                    batch.names.append(str(path))
                    pixels.append(image)
                    batch.originals.append(load_upright(path))
        x = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)
        yield replace(batch, x=input_spec.to_export_input(x))


def read_texts(examples: Sequence[str]) -> list[str]:
    """The texts: each example is a text, or a file with one text a line.

    Raises DataError on a file that is no text.
    """
    texts: list[str] = []
    for example in examples:
        if not os.path.isfile(example):
            texts.append(example)
            continue
        try:
            lines = Path(example).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise DataError(
                f"{example}: not a text file in UTF-8; give a file with one text a line, or the "
                "text itself"
            ) from None
        texts += [line for line in lines if line.strip()]
    return texts


def encode_text_batches(texts: Sequence[str], input_spec: TextInputSpec) -> Iterator[ExampleBatch]:
    """The texts in batches of BATCH_SIZE."""
    from tuner.preprocessing.tokenization import encode_texts

    for start in range(0, len(texts), BATCH_SIZE):
        chunk = list(texts[start : start + BATCH_SIZE])
        yield ExampleBatch(chunk, encode_texts(input_spec, chunk), list(chunk), [])


def write_picture(prediction: NamedPrediction, folder: Path, number: int) -> Path | None:
    """Writes the picture of a prediction, where it has one, and returns its path.

    Raises StorageError.
    """
    if prediction.prediction.picture is None:
        return None
    path = folder / f"{number:04d}-{Path(prediction.name).stem[:100]}.png"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(prediction.prediction.picture)
    return path

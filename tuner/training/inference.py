"""Predictions by an export, for images, folders of images and globs, or for texts."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuner.config import plugins
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import (
    ImageInputSpec,
    InputSpec,
    TensorTree,
    TextInputSpec,
    input_spec_from_dict,
)
from tuner.core.output_modules import average_with_mirror, require_flips
from tuner.core.types import Prediction, Task
from tuner.errors import DataError, SpaceError, suggest_names
from tuner.files.atomic import disk_errors
from tuner.files.removal import MANIFEST
from tuner.manifest import PublishedExport, read_export, replaced
from tuner.preprocessing.example_files import find_images, read_texts
from tuner.preprocessing.image_decoding import (
    Picture,
    load_upright,
    silence_pillow,
    try_decode,
)
from tuner.training.building import build_task
from tuner.training.exported_models import (
    FORMAT_OF_ANY_DEVICE,
    open_export,
    open_weights,
    select_prediction_device,
)
from tuner.training.heat_maps import draw_heat_map, heat_maps

BATCH_SIZE = 16  # examples
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


def predict_examples(
    published: PublishedExport,
    examples: Sequence[str],
    export_format: str | None = None,
    device: str = "auto",
    *,
    trust: bool = False,
    flips: bool | None = None,
    batch_size: int = BATCH_SIZE,
    explain: bool = False,
) -> Iterator[NamedPrediction | str]:
    """Predicts images or texts by an export, a batch at a time.

    Args:
        published: The export.
        examples: Paths, folders and globs of images; or texts, and files with one text a line.
        export_format: The format to use; None: the first of PREFERRED_FORMATS that it has.
        device: Where it computes: auto, cpu or cuda.
        trust: Whether code that the export names may be imported and run.
        flips: Whether the outputs for each image and its mirror image are averaged; None: as the
            export was tested.
        batch_size: How many examples are in memory at a time.
        explain: Whether the picture of each prediction is a heat map of what speaks for its class.

    Yields:
        A prediction for each example, or a sentence about an example that cannot be read.

    Raises:
        SpaceError: The format or the device is unknown, the format cannot use it, the export names
            code that is not trusted, or its task has no flips.
        StorageError: There is no such device.
        DataError: An example does not exist.
    """
    predictor = open_predictor(published, export_format, device, trust=trust, flips=flips)
    if explain:
        predictor = replace(predictor, explained=require_explainable(predictor, export_format))
    sources = read_texts(examples) if predictor.takes_texts else find_images(examples)
    return predictor.predict_all(sources, batch_size)


@dataclass(frozen=True)
class Predictor:
    """An opened export: a function from examples as an export takes them to the model's output,
    with the task that reads the output. `device` is where it computes. `explained`: the model, on
    the CPU, whose heat maps become the pictures of predictions.
    """

    published: PublishedExport
    function: Callable[[TensorTree], TensorTree]
    task: Task
    input_spec: InputSpec
    device: torch.device
    explained: ExportModule | None = None

    @property
    def takes_texts(self) -> bool:
        return isinstance(self.input_spec, TextInputSpec)

    def predict_all(
        self, examples: Iterable[Any], batch_size: int = BATCH_SIZE
    ) -> Iterator[NamedPrediction | str]:
        """A prediction for each example, or a sentence about one that cannot be read.

        Examples are texts; or images as paths, PIL images, or arrays (h, w, 3) of uint8.
        """
        kind = "text" if self.takes_texts else "image"
        for batch in self.batches(examples, batch_size):
            yield from batch.problems
            for name, prediction in zip(batch.names, self.predict_batch(batch), strict=True):
                yield NamedPrediction(kind, name, prediction)

    def batches(self, examples: Iterable[Any], batch_size: int) -> Iterator["ExampleBatch"]:
        """The examples in batches, prepared as the model's weights need them."""
        if isinstance(self.input_spec, TextInputSpec):
            return encode_text_batches(examples, self.input_spec, batch_size)
        return read_image_batches(examples, self.input_spec, batch_size)

    def predict_batch(self, batch: "ExampleBatch") -> list[Prediction]:
        if not batch.names:
            return []
        with torch.no_grad():
            predictions = self.task.describe_predictions(
                self.function, batch.x, batch.originals, self.input_spec
            )
        if self.explained is None:
            return predictions
        assert isinstance(batch.x, torch.Tensor)
        names = list(self.published.manifest["classes"])
        likeliest = [
            max(p.values["classes"].items(), key=lambda pair: pair[1])[0] for p in predictions
        ]
        classes = torch.tensor([names.index(name) for name in likeliest])
        heats = heat_maps(self.explained, batch.x, classes)
        return [
            replace(prediction, picture=draw_heat_map(pixels, heat))
            for prediction, pixels, heat in zip(predictions, batch.x, heats, strict=True)
        ]


def require_explainable(predictor: Predictor, export_format: str | None) -> ExportModule:
    """The model of an export whose predictions can be explained. Raises SpaceError on others."""
    task = predictor.published.run.task.name
    if task != "classification" or predictor.takes_texts:
        raise SpaceError(
            "--explain draws what speaks for the class of an image; this is "
            f"{task.replace('_', ' ')}"
        )
    if export_format not in (None, FORMAT_OF_ANY_DEVICE):
        raise SpaceError(
            f"--explain needs the gradients of --format {FORMAT_OF_ANY_DEVICE}, not {export_format}"
        )
    return open_weights(predictor.published)


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
    published: PublishedExport,
    export_format: str | None = None,
    device: str = "auto",
    *,
    trust: bool = False,
    flips: bool | None = None,
) -> Predictor:
    """Opens an export for predictions; the arguments are those of `predict_examples`.

    Another process may replace the export while it is opened; then the new export is opened.
    """
    while True:
        exports = published.manifest["exports"]
        available = [name for name in PREFERRED_FORMATS if name in exports] or list(exports)
        chosen = export_format or available[0]
        target = select_prediction_device(device, chosen)
        require_format(published, chosen)
        if not trust:
            refuse_code(published, chosen)
        try:
            with plugins.installed_only():
                function = open_export(published, chosen, target)
                task = build_task(published.run, tuple(published.manifest["classes"]))
                if published.manifest.get("thresholds"):
                    task = task.at_thresholds(published.manifest["thresholds"])
            input_spec = input_spec_from_dict(published.manifest["preprocess"], published.folder)
        except Exception:  # anything can fail where files of two exports are mixed
            newer = find_replacement(published)
            if newer is None:
                raise
        else:
            newer = find_replacement(published)
            if newer is None:
                break
        published = newer
    if flips or (flips is None and published.manifest.get("test_flips")):
        require_flips(task, "--flips")
        function = average_with_mirror(function, task.mirror_output)
    return Predictor(published, function, task, input_spec, target)


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


def read_image_batches(
    images: Iterable[Picture], input_spec: InputSpec, batch_size: int = BATCH_SIZE
) -> Iterator[ExampleBatch]:
    """The images in batches; those without a path are called `image 0`, `image 1`, …"""
    assert isinstance(input_spec, ImageInputSpec)
    numbered = enumerate(images)
    while chunk := list(itertools.islice(numbered, batch_size)):
        batch = ExampleBatch([], torch.empty(0), [], [])
        pixels = []
        with silence_pillow():
            for number, image in chunk:
                name = str(image) if isinstance(image, Path) else f"image {number}"
                decoded = try_decode(image, input_spec, name)
                if isinstance(decoded, str):
                    batch.problems.append(decoded)
                else:
                    batch.names.append(name)
                    pixels.append(decoded)
                    batch.originals.append(load_upright(image, input_spec.grey_bits))
        x = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)
        yield replace(batch, x=input_spec.to_export_input(x))


def encode_text_batches(
    texts: Iterable[str], input_spec: TextInputSpec, batch_size: int = BATCH_SIZE
) -> Iterator[ExampleBatch]:
    """The texts in batches."""
    from tuner.preprocessing.tokenization import encode_texts

    remaining = iter(texts)
    while chunk := list(itertools.islice(remaining, batch_size)):
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

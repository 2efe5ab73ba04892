"""Predictions by an export: for images, folders of images and globs, or for texts."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from tuner.core.types import Prediction, Task
from tuner.errors import DataError, SpaceError, nearest_path_hint, suggest_names
from tuner.files.atomic import disk_errors
from tuner.files.removal import MANIFEST
from tuner.manifest import PublishedExport, read_export, replaced
from tuner.preprocessing.image_decoding import SUFFIXES, load_upright, silence_pillow, try_decode
from tuner.training.building import build_task
from tuner.training.exported_models import open_export

BATCH_SIZE = 16
PREFERRED_FORMATS = ("safetensors", "torch_export", "onnx")


@dataclass(frozen=True)
class NamedPrediction:
    kind: str  # image or text
    name: str  # of the image, or the text itself
    prediction: Prediction


def find_export(studies: Path, name: str) -> PublishedExport:
    """A study by name or folder, or an export's folder. Raises DataError."""
    for folder in (studies / name / "export", Path(name) / "export", Path(name)):
        published = (
            read_export(folder) if os.path.isdir(folder) else None
        )  # Path.is_dir raises on a name that is too long
        if published is not None:
            return published
    if os.path.isfile(studies / name / "space.yaml"):
        raise DataError(
            f"study {name!r} has no export yet; finish it with `tuner run`, or call `tuner export {name}`"
        )
    known = sorted(p.parent.parent.name for p in studies.glob("*/export/manifest.json"))
    hint = suggest_names(name, known) if known else "; make one with `tuner run FILE`"
    raise DataError(
        f"no export under {name!r}: neither a study in {studies} nor a folder with manifest.json{hint}"
    )


def find_images(patterns: Sequence[str]) -> list[Path]:
    """The images that paths, folders and globs name, in order, each once. Raises DataError for what is not there."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        # a name may hold glob characters itself, so what exists comes first
        named = (
            [path]
            if os.path.lexists(path)
            else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        )
        inside = [p for one in named for p in (_images_below(one) if one.is_dir() else [one])]
        if path not in named:
            inside = [p for p in inside if p.suffix.lower() in SUFFIXES] or inside
        if not inside:
            raise DataError(f"{pattern}: no image there{nearest_path_hint(path)}")
        found |= dict.fromkeys(inside)
    return list(found)


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())


def predict_examples(
    published: PublishedExport,
    examples: Sequence[str],
    export_format: str | None = None,
    *,
    trust: bool = False,
) -> Iterator[NamedPrediction | str]:
    """A prediction for each image or text that `named` means, or a sentence for one that cannot be read.

    Raises SpaceError on an unknown format, and on an export that names code unless it is to be trusted; DataError for
    what is not there.
    """
    exports = published.manifest["exports"]
    export_format = export_format or next(
        (k for k in PREFERRED_FORMATS if k in exports), next(iter(exports))
    )
    function, task, wanted = opened(published, export_format, trust=trust)
    batches = (
        encode_text_batches(read_texts(examples), wanted)
        if isinstance(wanted, TextInputSpec)
        else read_image_batches(find_images(examples), wanted)
    )
    for batch in batches:
        yield from batch.problems
        if batch.names:
            with torch.no_grad():
                told = task.describe_predictions(function, batch.x, batch.originals, wanted)
            export_format = "text" if isinstance(wanted, TextInputSpec) else "image"
            yield from (
                NamedPrediction(export_format, name, one)
                for name, one in zip(batch.names, told, strict=True)
            )


def require_format(published: PublishedExport, kind: str) -> None:
    exports = published.manifest["exports"]
    if kind not in exports:
        raise SpaceError(
            f"--format {kind!r} was not exported{suggest_names(kind, exports)}; make it with `tuner export`"
        )


def refuse_code(published: PublishedExport, kind: str) -> None:
    """Raises SpaceError where the export names code that is not tuner's: it may be somebody else's export."""
    for key, name in published.code(kind).items():
        raise SpaceError(
            f"{published.folder / MANIFEST}: {key}: {name!r} is code, which would be imported and run; if the export is "
            "your own, or you have read that code, add --trust (its module is found on PYTHONPATH, not in this folder)"
        )


def opened(
    published: PublishedExport, kind: str, *, trust: bool
) -> tuple[Callable[[TensorTree], TensorTree], Task, InputSpec]:
    """The export as a function, its task and what it takes; where another takes its place meanwhile, of that one."""
    while True:
        require_format(published, kind)
        if not trust:
            refuse_code(published, kind)
        try:
            with plugins.installed_only():
                function = open_export(published, kind)
                task = build_task(published.run, tuple(published.manifest["classes"]))
            wanted = input_spec_from_dict(published.manifest["preprocess"], published.folder)
        except Exception:  # of a half of each: a file is gone, or fits no more
            newer = replacement(published)
            if newer is None:
                raise
        else:
            newer = replacement(published)
            if newer is None:
                return function, task, wanted
        published = newer


def replacement(published: PublishedExport) -> PublishedExport | None:
    """The export that has taken this one's place since it was read."""
    return read_export(published.folder) if replaced(published) else None


@dataclass(frozen=True)
class ExampleBatch:
    """Some of the examples to be predicted; `bad` says what could not be read."""

    names: list[str]
    x: TensorTree
    originals: list[Any]
    problems: list[str]


def read_image_batches(paths: Sequence[Path], input_spec: InputSpec) -> Iterator[ExampleBatch]:
    assert isinstance(input_spec, ImageInputSpec)
    for start in range(0, len(paths), BATCH_SIZE):
        names, pixels, originals, bad = [], [], [], []
        with silence_pillow():
            for path in paths[start : start + BATCH_SIZE]:
                found = try_decode(path, input_spec)
                if isinstance(found, str):
                    bad.append(found)
                else:
                    names.append(str(path))
                    pixels.append(found)
                    originals.append(load_upright(path))
        x = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)
        yield ExampleBatch(names, input_spec.to_export_input(x), originals, bad)


def read_texts(named: Sequence[str]) -> list[str]:
    """Each argument is a text, or a file with one a line. Raises DataError on a file that is no text."""
    found: list[str] = []
    for words in named:
        if not os.path.isfile(words):
            found.append(words)
            continue
        try:
            found += [
                line
                for line in Path(words).read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        except UnicodeDecodeError:
            raise DataError(
                f"{words}: not a text file in UTF-8; give a file with one text a line, or the text itself"
            ) from None
    return found


def encode_text_batches(asked: Sequence[str], input_spec: TextInputSpec) -> Iterator[ExampleBatch]:
    from tuner.preprocessing.tokenization import encode_texts

    for start in range(0, len(asked), BATCH_SIZE):
        chunk = list(asked[start : start + BATCH_SIZE])
        yield ExampleBatch(chunk, encode_texts(input_spec, chunk), list(chunk), [])


def write_picture(prediction: NamedPrediction, folder: Path, number: int) -> Path | None:
    """Writes the picture of a prediction, where it has one, and says where. Raises StorageError."""
    if prediction.prediction.picture is None:
        return None
    path = folder / f"{number:04d}-{Path(prediction.name).stem[:100]}.png"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(prediction.prediction.picture)
    return path

"""Predictions by an export, for images, folders of images and globs."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tuner.core import Preprocess
from tuner.data.folder import SUFFIXES
from tuner.errors import DataError, suggest
from tuner.images import decode
from tuner.manifest import Published, read
from tuner.winner import open_export

PREFERRED = ("safetensors", "torch_export", "onnx")


@dataclass(frozen=True)
class Prediction:
    path: Path
    classes: tuple[tuple[str, float], ...]  # (name, probability), most likely first


def find(studies: Path, name: str) -> Published:
    """A study by name or folder, or an export's folder. Raises DataError."""
    for folder in (studies / name / "export", Path(name) / "export", Path(name)):
        published = read(folder)
        if published is not None:
            return published
    known = [p.parent.parent.name for p in studies.glob("*/export/manifest.json")]
    hint = suggest(name, known) if known else "; make one with `tuner run FILE`"
    raise DataError(f"no export under {name!r}: neither a study in {studies} nor a folder with manifest.json{hint}")


def images(patterns: Sequence[str]) -> list[Path]:
    """The images that paths, folders and globs name, in order. Raises DataError for what is not there."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.exists():
            inside = [path]
        else:
            inside = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        if not inside:
            raise DataError(f"{pattern}: no image there")
        found += inside
    return found


def predict(published: Published, paths: Sequence[Path], kind: str | None = None, batch: int = 64) -> Iterator[Prediction | str]:
    """A prediction for each path, or a sentence for one that cannot be read. Raises DataError on an unknown format."""
    exports = published.manifest["exports"]
    if kind is not None and kind not in exports:
        raise DataError(f"format {kind!r} was not exported{suggest(kind, exports)}; make it with `tuner export`")
    kind = kind or next((k for k in PREFERRED if k in exports), next(iter(exports)))
    function = open_export(published, kind)
    wanted = published.manifest["preprocess"]
    preprocess = Preprocess(wanted["size"], wanted["resize"], wanted["interpolation"], tuple(wanted["mean"]), tuple(wanted["std"]))
    classes = published.manifest["classes"]
    for start in range(0, len(paths), batch):
        chunk = paths[start : start + batch]
        read_ = [_read(path, preprocess) for path in chunk]
        good = [r for r in read_ if not isinstance(r, str)]
        with torch.no_grad():
            probabilities = iter(function(torch.from_numpy(np.stack(good)).float() / 255).softmax(1).tolist() if good else [])
        for path, found in zip(chunk, read_, strict=True):
            if isinstance(found, str):
                yield found
            else:
                ranked = sorted(zip(classes, next(probabilities), strict=True), key=lambda pair: -pair[1])
                yield Prediction(path, tuple(ranked))


def _read(path: Path, preprocess: Preprocess) -> "np.ndarray | str":
    try:
        return decode(path, preprocess)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path}: cannot be read ({str(error).replace(str(path), 'this file')})"

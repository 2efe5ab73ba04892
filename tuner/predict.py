"""Predictions by an export, for images, folders of images and globs."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tuner.core import Preprocess
from tuner.decoding import SUFFIXES, attempt, quietly
from tuner.errors import DataError, SpaceError, nearest, suggest
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
        published = read(folder) if os.path.isdir(folder) else None  # Path.is_dir raises on a name that is too long
        if published is not None:
            return published
    if os.path.isfile(studies / name / "space.yaml"):
        raise DataError(f"study {name!r} has no export yet; finish it with `tuner run`, or call `tuner export {name}`")
    known = sorted(p.parent.parent.name for p in studies.glob("*/export/manifest.json"))
    hint = suggest(name, known) if known else "; make one with `tuner run FILE`"
    raise DataError(f"no export under {name!r}: neither a study in {studies} nor a folder with manifest.json{hint}")


def images(patterns: Sequence[str]) -> list[Path]:
    """The images that paths, folders and globs name, in order, each once. Raises DataError for what is not there."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        # a name may hold glob characters itself, so what exists comes first
        named = [path] if os.path.lexists(path) else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        inside = [p for one in named for p in (_inside(one) if one.is_dir() else [one])]
        if path not in named:
            inside = [p for p in inside if p.suffix.lower() in SUFFIXES] or inside
        if not inside:
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{pattern}: no image there{nearest(path.name, beside)}")
        found |= dict.fromkeys(inside)
    return list(found)


def _inside(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())


def predict(published: Published, paths: Sequence[Path], kind: str | None = None, batch: int = 64) -> Iterator[Prediction | str]:
    """A prediction for each path, or a sentence for one that cannot be read. Raises SpaceError on an unknown format."""
    exports = published.manifest["exports"]
    if kind is not None and kind not in exports:
        raise SpaceError(f"--format {kind!r} was not exported{suggest(kind, exports)}; make it with `tuner export`")
    kind = kind or next((k for k in PREFERRED if k in exports), next(iter(exports)))
    function = open_export(published, kind)
    wanted = published.manifest["preprocess"]
    preprocess = Preprocess(wanted["size"], wanted["resize"], wanted["interpolation"], tuple(wanted["mean"]), tuple(wanted["std"]))
    classes = published.manifest["classes"]
    for start in range(0, len(paths), batch):
        chunk = paths[start : start + batch]
        with quietly():
            decoded = [attempt(path, preprocess) for path in chunk]
        good = [pixels for pixels in decoded if not isinstance(pixels, str)]
        with torch.no_grad():
            probabilities = iter(function(torch.from_numpy(np.stack(good)).float() / 255).softmax(1).tolist() if good else [])
        for path, pixels in zip(chunk, decoded, strict=True):
            if isinstance(pixels, str):
                yield pixels
            else:
                ranked = sorted(zip(classes, next(probabilities), strict=True), key=lambda pair: -pair[1])
                yield Prediction(path, tuple(ranked))

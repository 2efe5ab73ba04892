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
from tuner.core.input_spec import Preprocess, Tokens, Tree, Wanted, wanted_of
from tuner.core.types import Task, Told
from tuner.errors import DataError, SpaceError, nearest, suggest
from tuner.files.atomic import disk_errors
from tuner.files.removal import MANIFEST
from tuner.manifest import Published, read, replaced
from tuner.preprocessing.image_decoding import SUFFIXES, attempt, quietly, upright
from tuner.training.building import task_of
from tuner.training.finalization import open_export

BATCH = 16
PREFERRED = ("safetensors", "torch_export", "onnx")


@dataclass(frozen=True)
class Prediction:
    kind: str  # image or text
    name: str  # of the image, or the text itself
    told: Told


def find(studies: Path, name: str) -> Published:
    """A study by name or folder, or an export's folder. Raises DataError."""
    for folder in (studies / name / "export", Path(name) / "export", Path(name)):
        published = (
            read(folder) if os.path.isdir(folder) else None
        )  # Path.is_dir raises on a name that is too long
        if published is not None:
            return published
    if os.path.isfile(studies / name / "space.yaml"):
        raise DataError(
            f"study {name!r} has no export yet; finish it with `tuner run`, or call `tuner export {name}`"
        )
    known = sorted(p.parent.parent.name for p in studies.glob("*/export/manifest.json"))
    hint = suggest(name, known) if known else "; make one with `tuner run FILE`"
    raise DataError(
        f"no export under {name!r}: neither a study in {studies} nor a folder with manifest.json{hint}"
    )


def images(patterns: Sequence[str]) -> list[Path]:
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


def predict(
    published: Published, named: Sequence[str], kind: str | None = None, *, trust: bool = False
) -> Iterator[Prediction | str]:
    """A prediction for each image or text that `named` means, or a sentence for one that cannot be read.

    Raises SpaceError on an unknown format, and on an export that names code unless it is to be trusted; DataError for
    what is not there.
    """
    exports = published.manifest["exports"]
    kind = kind or next((k for k in PREFERRED if k in exports), next(iter(exports)))
    function, task, wanted = opened(published, kind, trust=trust)
    batches = (
        of_texts(texts(named), wanted)
        if isinstance(wanted, Tokens)
        else of_images(images(named), wanted)
    )
    for batch in batches:
        yield from batch.bad
        if batch.names:
            with torch.no_grad():
                told = task.tell(function, batch.x, batch.originals, wanted)
            kind = "text" if isinstance(wanted, Tokens) else "image"
            yield from (
                Prediction(kind, name, one) for name, one in zip(batch.names, told, strict=True)
            )


def require_format(published: Published, kind: str) -> None:
    exports = published.manifest["exports"]
    if kind not in exports:
        raise SpaceError(
            f"--format {kind!r} was not exported{suggest(kind, exports)}; make it with `tuner export`"
        )


def refuse_code(published: Published, kind: str) -> None:
    """Raises SpaceError where the export names code that is not tuner's: it may be somebody else's export."""
    for key, name in published.code(kind).items():
        raise SpaceError(
            f"{published.folder / MANIFEST}: {key}: {name!r} is code, which would be imported and run; if the export is "
            "your own, or you have read that code, add --trust (its module is found on PYTHONPATH, not in this folder)"
        )


def opened(
    published: Published, kind: str, *, trust: bool
) -> tuple[Callable[[Tree], Tree], Task, Wanted]:
    """The export as a function, its task and what it takes; where another takes its place meanwhile, of that one."""
    while True:
        require_format(published, kind)
        if not trust:
            refuse_code(published, kind)
        try:
            with plugins.installed_only():
                function = open_export(published, kind)
                task = task_of(published.run, tuple(published.manifest["classes"]))
            wanted = wanted_of(published.manifest["preprocess"], published.folder)
        except Exception:  # of a half of each: a file is gone, or fits no more
            newer = replacement(published)
            if newer is None:
                raise
        else:
            newer = replacement(published)
            if newer is None:
                return function, task, wanted
        published = newer


def replacement(published: Published) -> Published | None:
    """The export that has taken this one's place since it was read."""
    return read(published.folder) if replaced(published) else None


@dataclass(frozen=True)
class Asked:
    """Some of the examples to be predicted; `bad` says what could not be read."""

    names: list[str]
    x: Tree
    originals: list[Any]
    bad: list[str]


def of_images(paths: Sequence[Path], wanted: Wanted) -> Iterator[Asked]:
    assert isinstance(wanted, Preprocess)
    for start in range(0, len(paths), BATCH):
        names, pixels, originals, bad = [], [], [], []
        with quietly():
            for path in paths[start : start + BATCH]:
                found = attempt(path, wanted)
                if isinstance(found, str):
                    bad.append(found)
                else:
                    names.append(str(path))
                    pixels.append(found)
                    originals.append(upright(path))
        x = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)
        yield Asked(names, wanted.given(x), originals, bad)


def texts(named: Sequence[str]) -> list[str]:
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


def of_texts(asked: Sequence[str], wanted: Tokens) -> Iterator[Asked]:
    from tuner.preprocessing.tokenization import encode

    for start in range(0, len(asked), BATCH):
        chunk = list(asked[start : start + BATCH])
        yield Asked(chunk, encode(wanted, chunk), list(chunk), [])


def draw(prediction: Prediction, folder: Path, number: int) -> Path | None:
    """Writes the picture of a prediction, where it has one, and says where. Raises StorageError."""
    if prediction.told.picture is None:
        return None
    path = folder / f"{number:04d}-{Path(prediction.name).stem[:100]}.png"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(prediction.told.picture)
    return path

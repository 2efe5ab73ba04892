"""Decoded images as sources: split, augmented by (index, view), ready for a model's own preprocessing."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.config.run import ImageOptions
from tuner.core.input_spec import Preprocess, Wanted
from tuner.core.targets import Labels, Targets
from tuner.core.types import Batch, Data
from tuner.errors import DataError, SpaceError
from tuner.files.cache_entries import Held
from tuner.preprocessing.duplicate_images import shared_between_classes, shared_between_parts
from tuner.preprocessing.image_store import Store, store
from tuner.preprocessing.splits import PARTS, TEST, TRAIN, VALID, Items, checked, divided


@dataclass(frozen=True)
class Images:
    """Rows of a store as a Source: x uint8 (n, 3, size, size), y as the targets have it."""

    held: Held
    pixels: Tensor
    targets: Targets
    rows: Tensor
    flip: bool
    views: int | None
    digest: str
    lengths: None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor, view: int) -> Batch:
        rows = self.rows[index]
        x, y = self.pixels[rows], self.targets.take(rows)
        if self.flip:
            # half of the images face the other way, and the other half in the next view: a function of (index, view)
            mirrored = ((rows * 2654435761 >> 7) + view) % 2 == 1
            x[mirrored] = x[mirrored].flip(3)
            y = self.targets.mirror(y, mirrored)
        return Batch(x, y)


Truth = Callable[[Store, Items, Preprocess], Targets]
"""From the images that could be read, and their items, to what is true of each."""


def dataset(
    home: Path, items: Items, options: ImageOptions, wanted: Wanted, warnings: Sequence[str] = ()
) -> Data:
    """Items with one class each, split, decoded and ready. Raises DataError on too few classes, and as `assembled` does."""
    checked(items)
    found = list(warnings)

    def truth(store: Store, kept: Items, _: Preprocess) -> Labels:
        found.extend(shared_between_classes(kept.pictures, kept.labels, kept.strata, store.same))
        return Labels(torch.from_numpy(kept.labels))

    return assembled(home, items, options, wanted, items.strata, truth, found)


def assembled(
    home: Path,
    items: Items,
    options: ImageOptions,
    wanted: Wanted,
    classes: tuple[str, ...],
    truth: Truth,
    warnings: Sequence[str] = (),
) -> Data:
    """Items split, decoded and ready. Raises DataError on too few images, and on unreadable ones."""
    preprocess = resolve(options, wanted)
    items = divided(items, options)
    held = store(home, items.pictures, preprocess, options.on_bad_image)
    items = items.rows(held.kept)
    targets = truth(held, items, preprocess)
    content = digest(held.digest, *targets.content, *classes)

    def source(*parts: int, flip: bool = False) -> Images:
        rows = np.flatnonzero(np.isin(items.part, parts))
        return Images(
            held.held,
            held.pixels,
            targets,
            torch.from_numpy(rows),
            flip,
            options.views if flip else 1,
            digest(content, _nonempty(rows, parts).tobytes(), str(flip)),
        )

    flip = options.augment == "flip"
    train, valid, test, full = (
        source(TRAIN, flip=flip),
        source(VALID),
        source(TEST),
        source(TRAIN, VALID, flip=flip),
    )
    warnings = (*warnings, *shared_between_parts(items.pictures, items.part, held.same))
    all_of_it = digest(content, str(preprocess), train.digest, valid.digest, test.digest)
    return Data(
        train, valid, test, full, classes, preprocess, all_of_it, (*warnings, *held.warnings)
    )


def resolve(options: ImageOptions, wanted: Wanted) -> Preprocess:
    """What the file says, and for what it leaves open what the weights want. A new size keeps the crop's proportion.

    Raises SpaceError on a size that is not the model's, a resize below it, a standard deviation of 0, and a model that wants no images.
    """
    if not isinstance(wanted, Preprocess):
        raise SpaceError(
            "data.name: these are images, but the model wants texts; use data: text, or a model of images"
        )
    size = options.size or wanted.size
    if size % wanted.multiple:
        below = size // wanted.multiple * wanted.multiple
        either = " or ".join(str(side) for side in (below, below + wanted.multiple) if side)
        raise SpaceError(
            f"data.size: {size}, but the model wants a multiple of {wanted.multiple}: {either}"
        )
    if options.resize is not None and options.resize < size:
        raise SpaceError(f"data.resize: {options.resize}, but the crop of {size} must fit into it")
    if options.std is not None and min(options.std) <= 0:
        raise SpaceError(
            f"data.std: {', '.join(f'{v:g}' for v in options.std)}; each must be above 0"
        )
    return Preprocess(
        size=size,
        resize=options.resize or max(size, round(size * wanted.resize / wanted.size)),
        interpolation=options.interpolation or wanted.interpolation,
        mean=options.mean or wanted.mean,
        std=options.std or wanted.std,
        fit=wanted.fit,
        multiple=wanted.multiple,
    )


def _nonempty(rows: NDArray[np.int64], parts: Sequence[int]) -> NDArray[np.int64]:
    if len(rows) == 0:
        raise DataError(f"data: no {PARTS[parts[0]]} image can be read")
    return rows


def digest(*content: str | bytes) -> str:
    """SHA-256 over pieces, each with its length, so that none runs into the next."""
    seen = hashlib.sha256()
    for piece in content:
        data = piece if isinstance(piece, bytes) else piece.encode(errors="surrogateescape")
        seen.update(f"{len(data)} ".encode() + data)
    return seen.hexdigest()

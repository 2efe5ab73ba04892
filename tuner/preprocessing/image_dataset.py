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
from tuner.core.input_spec import ImageInputSpec, InputSpec
from tuner.core.targets import Labels, Targets
from tuner.core.types import Batch, Dataset
from tuner.errors import DataError, SpaceError
from tuner.files.cache_entries import PinnedEntry
from tuner.preprocessing.duplicate_images import (
    find_images_in_two_classes,
    find_images_in_two_splits,
)
from tuner.preprocessing.image_store import ImageStore, open_image_store
from tuner.preprocessing.splits import (
    SPLIT_NAMES,
    TEST,
    TRAIN,
    VALID,
    Items,
    assign_and_limit_splits,
    check_classes,
)


@dataclass(frozen=True)
class ImageSource:
    """Rows of a store as a Source: x uint8 (n, 3, size, size), y as the targets have it."""

    entry: PinnedEntry
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


MakeTargets = Callable[[ImageStore, Items, ImageInputSpec], Targets]
"""From the images that could be read, and their items, to what is true of each."""


def classification_dataset(
    home: Path,
    items: Items,
    options: ImageOptions,
    input_spec: InputSpec,
    warnings: Sequence[str] = (),
) -> Dataset:
    """Items with one class each, split, decoded and ready. Raises DataError on too few classes, and as `assembled` does."""
    check_classes(items)
    found = list(warnings)

    def truth(store: ImageStore, kept: Items, _: ImageInputSpec) -> Labels:
        found.extend(
            find_images_in_two_classes(kept.examples, kept.labels, kept.strata, store.equal_rows)
        )
        return Labels(torch.from_numpy(kept.labels))

    return assemble_dataset(home, items, options, input_spec, items.strata, truth, found)


def assemble_dataset(
    home: Path,
    items: Items,
    options: ImageOptions,
    input_spec: InputSpec,
    classes: tuple[str, ...],
    make_targets: MakeTargets,
    warnings: Sequence[str] = (),
) -> Dataset:
    """Items split, decoded and ready. Raises DataError on too few images, and on unreadable ones."""
    preprocess = resolve_image_spec(options, input_spec)
    items = assign_and_limit_splits(items, options)
    held = open_image_store(home, items.examples, preprocess, options.on_bad_image)
    items = items.select(held.readable)
    targets = make_targets(held, items, preprocess)
    content = content_digest(held.digest, *targets.content, *classes)

    def source(*parts: int, flip: bool = False) -> ImageSource:
        rows = np.flatnonzero(np.isin(items.split, parts))
        return ImageSource(
            held.entry,
            held.pixels,
            targets,
            torch.from_numpy(rows),
            flip,
            options.views if flip else 1,
            content_digest(content, _require_rows(rows, parts).tobytes(), str(flip)),
        )

    flip = options.augment == "flip"
    train, valid, test, full = (
        source(TRAIN, flip=flip),
        source(VALID),
        source(TEST),
        source(TRAIN, VALID, flip=flip),
    )
    warnings = (*warnings, *find_images_in_two_splits(items.examples, items.split, held.equal_rows))
    all_of_it = content_digest(content, str(preprocess), train.digest, valid.digest, test.digest)
    return Dataset(
        train, valid, test, full, classes, preprocess, all_of_it, (*warnings, *held.warnings)
    )


def resolve_image_spec(options: ImageOptions, input_spec: InputSpec) -> ImageInputSpec:
    """What the file says, and for what it leaves open what the weights want. A new size keeps the crop's proportion.

    Raises SpaceError on a size that is not the model's, a resize below it, a standard deviation of 0, and a model that wants no images.
    """
    if not isinstance(input_spec, ImageInputSpec):
        raise SpaceError(
            "data.name: these are images, but the model wants texts; use data: text, or a model of images"
        )
    size = options.size or input_spec.size
    if size % input_spec.multiple:
        below = size // input_spec.multiple * input_spec.multiple
        either = " or ".join(str(side) for side in (below, below + input_spec.multiple) if side)
        raise SpaceError(
            f"data.size: {size}, but the model wants a multiple of {input_spec.multiple}: {either}"
        )
    if options.resize is not None and options.resize < size:
        raise SpaceError(f"data.resize: {options.resize}, but the crop of {size} must fit into it")
    if options.std is not None and min(options.std) <= 0:
        raise SpaceError(
            f"data.std: {', '.join(f'{v:g}' for v in options.std)}; each must be above 0"
        )
    return ImageInputSpec(
        size=size,
        resize=options.resize or max(size, round(size * input_spec.resize / input_spec.size)),
        interpolation=options.interpolation or input_spec.interpolation,
        mean=options.mean or input_spec.mean,
        std=options.std or input_spec.std,
        fit=input_spec.fit,
        multiple=input_spec.multiple,
    )


def _require_rows(rows: NDArray[np.int64], parts: Sequence[int]) -> NDArray[np.int64]:
    if len(rows) == 0:
        raise DataError(f"data: no {SPLIT_NAMES[parts[0]]} image can be read")
    return rows


def content_digest(*content: str | bytes) -> str:
    """SHA-256 over pieces, each with its length, so that none runs into the next."""
    seen = hashlib.sha256()
    for piece in content:
        data = piece if isinstance(piece, bytes) else piece.encode(errors="surrogateescape")
        seen.update(f"{len(data)} ".encode() + data)
    return seen.hexdigest()

"""Makes a dataset of images: splits and decodes them, and serves batches by (index, view)."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tuner.config.run import FLIP_VERSIONS, ImageOptions
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree
from tuner.core.subset import subset_of
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
    """Some rows of an image store as a `Source`.

    `take` gives x as uint8 (n, 3, size, size) and y as the targets define it.
    """

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
            mirrored = _is_mirrored(rows, view, endless=self.views is None)
            x[mirrored] = x[mirrored].flip(3)
            y = self.targets.mirror(y, mirrored)
        return Batch(x, y)

    def take_targets(self, index: Tensor) -> TensorTree:
        """The targets of these examples, not mirrored."""
        return self.targets.take(self.rows[index])


def _is_mirrored(rows: Tensor, view: int, *, endless: bool) -> Tensor:
    """Which rows `augment: flip` mirrors in a view: bool (n,), a function of (row, view) alone.

    Of a few views, each mirrors the half of the rows that the view before it does not. Of endless
    ones, each mirrors a half that a hash draws.
    """
    if endless:
        return _hash_32_bits(_hash_32_bits(rows) + view) % 2 == 1
    return ((rows * 2654435761 >> 7) + view) % 2 == 1


def _hash_32_bits(values: Tensor) -> Tensor:
    """A hash of the lowest 32 bits of each value; int64 in 0..2^32-1.

    It is `lowbias32` of Wellons, Prospecting for Hash Functions, 2018.
    """
    values = values & 0xFFFFFFFF
    values = (values ^ values >> 16) * 0x7FEB352D & 0xFFFFFFFF
    values = (values ^ values >> 15) * 0x846CA68B & 0xFFFFFFFF
    return values ^ values >> 16


def _view_count(options: ImageOptions) -> int | None:
    """The number of views of an augmented source; None: endless."""
    if options.augment == "none":
        return 1
    return FLIP_VERSIONS if options.views == "auto" else options.views


MakeTargets = Callable[[ImageStore, Items, ImageInputSpec], tuple[Targets, list[str]]]
"""Makes the targets of the readable images, given their items in the same order; and warnings."""


def classification_dataset(
    home: Path,
    items: Items,
    options: ImageOptions,
    input_spec: InputSpec,
    warnings: Sequence[str] = (),
) -> Dataset:
    """Split and decode images that have one class each.

    Args:
        home: the folder with the caches.
        items: the images; their strata are the classes.
        options: the image keys of the `data:` section.
        input_spec: how the examples must look for the model's weights.
        warnings: what the data source has to say already.

    Raises:
        DataError: there are too few classes, or as `assemble_dataset` does.
        SpaceError: as `resolve_image_spec` does.
    """
    check_classes(items)

    def make_targets(
        store: ImageStore, readable: Items, _: ImageInputSpec
    ) -> tuple[Labels, list[str]]:
        ambiguous = find_images_in_two_classes(
            readable.examples, readable.labels, readable.strata, store.equal_rows
        )
        return Labels(torch.from_numpy(readable.labels)), ambiguous

    return assemble_dataset(home, items, options, input_spec, items.strata, make_targets, warnings)


def assemble_dataset(
    home: Path,
    items: Items,
    options: ImageOptions,
    input_spec: InputSpec,
    classes: tuple[str, ...],
    make_targets: MakeTargets,
    warnings: Sequence[str] = (),
) -> Dataset:
    """Split and decode images, and make their targets by `make_targets`.

    Raises:
        DataError: there are too few images, or unreadable ones.
        SpaceError: as `resolve_image_spec` does.
    """
    image_spec = resolve_image_spec(options, input_spec)
    items = assign_and_limit_splits(items, options)
    store = open_image_store(home, items.examples, image_spec, options.on_bad_image)
    items = items.select(store.readable)
    targets, target_warnings = make_targets(store, items, image_spec)
    content = content_digest(store.digest, *targets.content, *classes)

    def make_source(*splits: int, flip: bool = False) -> ImageSource:
        rows = np.flatnonzero(np.isin(items.split, splits))
        if len(rows) == 0:
            raise DataError(f"data: no {SPLIT_NAMES[splits[0]]} image can be read")
        return ImageSource(
            store.entry,
            store.pixels,
            targets,
            torch.from_numpy(rows),
            flip,
            _view_count(options) if flip else 1,
            content_digest(content, rows.tobytes(), str(flip)),
        )

    flip = options.augment == "flip"
    train, valid, test = make_source(TRAIN, flip=flip), make_source(VALID), make_source(TEST)
    full = make_source(TRAIN, VALID, flip=flip)
    digest = content_digest(
        content, _digest_text(image_spec), train.digest, valid.digest, test.digest
    )
    shared = find_images_in_two_splits(items.examples, items.split, store.equal_rows)
    all_warnings = (*warnings, *target_warnings, *shared, *store.warnings)
    return Dataset(
        train=subset_of(full, train),
        valid=valid if flip else subset_of(full, valid),  # a mirrored image is another one
        test=test,
        full=full,
        classes=classes,
        input_spec=image_spec,
        digest=digest,
        warnings=all_warnings,
    )


def _digest_text(spec: ImageInputSpec) -> str:
    """The text that stands for an input spec in the digest of a dataset.

    Studies store the digest and are refused when it differs. So this text is written out and never
    changes, whatever the class and its fields are called; `Preprocess` was the name of the class.
    """
    return (
        f"Preprocess(size={spec.size}, resize={spec.resize}, "
        f"interpolation={spec.interpolation!r}, mean={spec.mean!r}, std={spec.std!r}, "
        f"fit={spec.fit!r}, multiple={spec.multiple})"
    )


def resolve_image_spec(options: ImageOptions, input_spec: InputSpec) -> ImageInputSpec:
    """The keys of the file, and what the weights need where the file leaves a key open.

    A new `size` keeps the proportion of `resize` to `size`.

    Raises:
        SpaceError: the size does not suit the model, `resize` is below the size, a standard
            deviation is 0, or the model takes no images.
    """
    if not isinstance(input_spec, ImageInputSpec):
        raise SpaceError(
            "data.name: these are images, but the model wants texts; "
            "use data: text, or a model of images"
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


def content_digest(*content: str | bytes) -> str:
    """SHA-256 over pieces, each preceded by its length, so that no two lists of pieces collide."""
    digest = hashlib.sha256()
    for piece in content:
        data = piece if isinstance(piece, bytes) else piece.encode(errors="surrogateescape")
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()

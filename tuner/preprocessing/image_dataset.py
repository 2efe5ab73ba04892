"""Makes a dataset of images: splits and decodes them, and serves batches by (index, view)."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tuner.config.augmentation import (
    CACHED_VIEWS,
    NO_AUGMENTATION,
    Augment,
    AugmentationPolicy,
    may_need_surroundings,
    resolve_policy,
    view_count,
)
from tuner.config.data_options import ImageFileOptions, ImageOptions
from tuner.core.device_transfers import gather_rows, send
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree
from tuner.core.subset import Subset, subset_of
from tuner.core.targets import Labels, Masks, Targets, labels_of
from tuner.core.types import Batch, Dataset, Source
from tuner.errors import DataError, SpaceError
from tuner.files.cache_entries import PinnedEntry
from tuner.preprocessing.augmentation import Augmenter
from tuner.preprocessing.duplicate_images import (
    find_images_in_two_classes,
    find_images_in_two_splits,
)
from tuner.preprocessing.example_groups import group_by_name
from tuner.preprocessing.image_store import (
    LEAVE_OUT_ALL,
    ImageStore,
    StreamedPixels,
    open_image_store,
)
from tuner.preprocessing.random_draws import hash_32_bits
from tuner.preprocessing.resident_tensors import ResidentTensors, share_tensors
from tuner.preprocessing.splits import (
    SPLIT_NAMES,
    TEST,
    TRAIN,
    VALID,
    Items,
    assign_and_limit_splits,
    check_classes,
    examined_data,
    rows_of,
)

AUGMENTATION_VERSION = 1  # another number, other pixels of the same policy
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ImageSource:
    """Some rows of an image store as a `Source`.

    `take` gives x as uint8 (n, 3, side, side), on `device`, and y as the targets define it. The
    first view of a policy other than the flip is the image as it is, so that a linear probe is
    solved on what validation sees. `resident` has the pixels too, on the device where they fit.
    """

    entry: PinnedEntry
    pixels: Tensor | StreamedPixels
    targets: Targets
    rows: Tensor
    side: int
    augmenter: Augmenter | None
    views: int | None
    digest: str
    device: torch.device = CPU
    resident: ResidentTensors | None = None
    lengths: None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor, view: int) -> Batch:
        rows = self.rows[index]
        if self.augmenter is None:
            return self._crop_centre(self._take_stored(rows))
        if self.augmenter.policy.is_flip_alone:
            return self._mirror(self._take_stored(rows), rows, view)
        if view == 0:
            return self._crop_centre(self._take_stored(rows))
        return self.augmenter.take(self._take_stored, rows, view)

    def _take_stored(self, rows: Tensor) -> Batch:
        """Pixels and targets as they are stored. Boxes stay on the CPU, where they are computed."""
        y = self.targets.take(rows)
        on_device = send(y, self.device) if isinstance(y, Tensor) else y
        if isinstance(self.pixels, StreamedPixels):
            return Batch(send(self.pixels.take(rows), self.device), on_device)
        pixels = self.pixels if self.resident is None else self.resident.tensors["pixels"]
        return Batch(gather_rows(pixels, rows, self.device), on_device)

    def _crop_centre(self, batch: Batch) -> Batch:
        x, y = batch
        assert isinstance(x, Tensor)
        margin = (x.shape[2] - self.side) // 2
        if margin == 0:
            return batch
        stop = margin + self.side
        return Batch(x[:, :, margin:stop, margin:stop], self.targets.crop(y, margin))

    def _mirror(self, batch: Batch, rows: Tensor, view: int) -> Batch:
        x, y = batch
        assert isinstance(x, Tensor)
        mirrored = _is_mirrored(rows, view, endless=self.views is None).nonzero()[:, 0]
        on_device = send(mirrored, self.device)  # numbers, as a mask would make the GPU wait
        x[on_device] = x[on_device].flip(3)
        of_targets = on_device if isinstance(y, Tensor) else mirrored
        return Batch(x, self.targets.mirror(y, of_targets))

    def take_targets(self, index: Tensor) -> TensorTree:
        """The targets of these examples, not augmented."""
        return self.targets.take(self.rows[index])

    @property
    def has_originals(self) -> bool:
        return isinstance(self.targets, Masks) and self.targets.read_original is not None

    def take_original(self, number: int) -> Tensor:
        """The mask of an example as it is on the disk, uint8 (height, width)."""
        assert isinstance(self.targets, Masks) and self.targets.read_original is not None
        return self.targets.read_original(int(self.rows[number]))

    def is_resident(self, view: int) -> bool:
        """Whether a batch needs hardly any work of the CPU.

        Boxes, masks and weighted labels are on the CPU, and a policy other than the flip draws many
        numbers there.
        """
        is_plain = self.augmenter is None or self.augmenter.policy.is_flip_alone or view == 0
        if self.resident is None or not is_plain or not isinstance(self.targets, Labels):
            return False
        if self.targets.weights is not None:
            return False
        return self.resident.is_resident()


def augment_on(source: Source, device: torch.device, *, resident: bool = False) -> Source:
    """The source with its images augmented on a device, where it is an ImageSource.

    `resident`: the images are kept in the memory of the device, if they fit.
    """
    if isinstance(source, Subset):
        return replace(source, whole=augment_on(source.whole, device, resident=resident))
    if not isinstance(source, ImageSource):
        return source
    if not resident or isinstance(source.pixels, StreamedPixels):
        return replace(source, device=device, resident=None)
    tensors = share_tensors({"pixels": source.pixels}, device)
    return replace(source, device=device, resident=tensors)


def _is_mirrored(rows: Tensor, view: int, *, endless: bool) -> Tensor:
    """Which rows `augment: flip` mirrors in a view: bool (n,), a function of (row, view) alone.

    Of a few views, each mirrors the half of the rows that the view before it does not. Of endless
    ones, each mirrors a half that a hash draws.
    """
    if endless:
        return hash_32_bits(hash_32_bits(rows) + view) % 2 == 1
    return ((rows * 2654435761 >> 7) + view) % 2 == 1


def stored_side(image_spec: ImageInputSpec, augment: Augment) -> int:
    """The side of the stored images in pixels.

    It is that of the canvas, or larger where an augmentation can use what surrounds the canvas: as
    large as the resized image allows. The margin is the same even number of pixels on all sides,
    so that the centre of a stored image is to the pixel what is stored without a margin: half a
    pixel is rounded to an even number.
    """
    if not may_need_surroundings(augment) or image_spec.fit != "crop":
        return image_spec.size
    return image_spec.size + (image_spec.resize - image_spec.size) // 4 * 4


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
    return labelled_dataset(home, items, options, input_spec, warnings)


def labelled_dataset(
    home: Path,
    items: Items,
    options: ImageOptions,
    input_spec: InputSpec,
    warnings: Sequence[str] = (),
) -> Dataset:
    """Split and decode images that have a class, a set of labels, or numbers each.

    The arguments and errors are those of `classification_dataset`, but for the number of classes;
    the items may have targets and weights.
    """

    def make_targets(
        store: ImageStore, readable: Items, _: ImageInputSpec
    ) -> tuple[Labels, list[str]]:
        labels = labels_of(readable.labels, readable.targets, readable.weights)
        if readable.targets is not None:
            return labels, []
        ambiguous = find_images_in_two_classes(
            readable.examples, readable.labels, readable.strata, store.equal_rows
        )
        return labels, ambiguous

    return assemble_dataset(home, items, options, input_spec, items.outputs, make_targets, warnings)


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
    if isinstance(options, ImageFileOptions) and options.group is not None:
        items, group_warnings = group_by_name(items, options.group)
        warnings = [*warnings, *group_warnings]
    items = assign_and_limit_splits(items, options)
    stored_spec = replace(image_spec, size=stored_side(image_spec, options.augment))
    record = examined_data()
    on_bad_image = options.on_bad_image if record is None else LEAVE_OUT_ALL
    store = open_image_store(home, items.examples, stored_spec, on_bad_image, may_stream=True)
    items = items.select(store.readable)
    if record is not None:
        record.items, record.image_sizes = items, store.original_sizes
        record.equal_rows, record.unreadable = store.equal_rows, store.unreadable
    image_spec = replace(image_spec, grey_bits=store.grey_bits)
    targets, target_warnings = make_targets(store, items, stored_spec)
    policy = _policy_for(options, targets)
    content = content_digest(store.digest, *targets.content, *classes)

    def make_source(*splits: int, policy: AugmentationPolicy = NO_AUGMENTATION) -> ImageSource:
        rows = rows_of(items, *splits)
        if len(rows) == 0:
            raise DataError(f"data: no {SPLIT_NAMES[splits[0]]} image can be read")
        own_rows = torch.from_numpy(rows)
        augmenter = Augmenter(policy, targets, own_rows, stored_spec.size, image_spec.size)
        return ImageSource(
            store.entry,
            store.pixels,
            targets,
            own_rows,
            image_spec.size,
            None if policy == NO_AUGMENTATION else augmenter,
            view_count(policy, options.views),
            content_digest(content, rows.tobytes(), _augmentation_text(policy, image_spec.size)),
        )

    train, valid, test = make_source(TRAIN, policy=policy), make_source(VALID), make_source(TEST)
    full = make_source(TRAIN, VALID, policy=policy)
    digest = content_digest(
        content, _digest_text(image_spec), train.digest, valid.digest, test.digest
    )
    shared = find_images_in_two_splits(items.examples, items.split, store.equal_rows)
    all_warnings = (*warnings, *target_warnings, *shared, *store.warnings)
    return Dataset(
        # a mosaic of training images must not show validation images
        train=train if policy.mosaic else subset_of(full, train),
        # an augmented image is another one
        valid=subset_of(full, valid) if policy == NO_AUGMENTATION else valid,
        test=test,
        full=full,
        classes=classes,
        input_spec=image_spec,
        digest=digest,
        warnings=all_warnings,
        views_are_for_cache=options.views == "auto" and view_count(policy, "auto") == CACHED_VIEWS,
    )


def _policy_for(options: ImageOptions, targets: Targets) -> AugmentationPolicy:
    """The policy of `data.augment`. Raises SpaceError where it does not suit the targets."""
    try:
        return resolve_policy(options.augment, targets.task)
    except ValueError as error:
        raise SpaceError(f"data.augment: {error}") from None


def _augmentation_text(policy: AugmentationPolicy, side: int) -> str:
    """The text that stands for an augmentation in the digest of a source.

    That of no augmentation and of the flip is what earlier versions wrote.
    """
    if policy == NO_AUGMENTATION or policy.is_flip_alone:
        return str(policy.is_flip_alone)
    keys = policy.model_dump_json(exclude_defaults=True)
    return f"{AUGMENTATION_VERSION} {side} {keys}"


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

    A new `size` keeps the proportion of `resize` to `size`. An export's spec states bits of grey,
    so that new data are read as its own were.

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
    if size < input_spec.least_size:
        raise SpaceError(
            f"data.size: {size}, but the model wants at least {input_spec.least_size} pixels; "
            f"leave data.size out or write {input_spec.least_size} or more"
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
        grey_bits=input_spec.grey_bits,
        least_size=input_spec.least_size,
    )


def content_digest(*content: str | bytes) -> str:
    """SHA-256 over pieces, each preceded by its length, so that no two lists of pieces collide."""
    digest = hashlib.sha256()
    for piece in content:
        data = piece if isinstance(piece, bytes) else piece.encode(errors="surrogateescape")
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()

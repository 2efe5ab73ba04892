"""Examines the data of a run: what is there, what is broken, alike or leaking, and which labels a
linear probe doubts. Nothing is trained but the probe, and nothing is downloaded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.config import plugins
from tuner.config.run import Run
from tuner.core.input_spec import TensorTree
from tuner.core.targets import split_weights
from tuner.core.types import Dataset, Source, TargetSource
from tuner.errors import SpaceError
from tuner.files.downloads import forbid_downloads
from tuner.preprocessing import near_duplicates
from tuner.preprocessing.splits import TEST, TRAIN, VALID, Items, examining_data
from tuner.training.building import DeviceSource, input_spec_of
from tuner.training.devices import DeviceContext
from tuner.training.label_doubts import (
    FOLDS,
    DoubtedLabel,
    estimate_out_of_fold,
    find_doubted_labels,
)
from tuner.training.model_scores import UnusableModel, build_probed_model, compute_features

PROBED_TASKS = ("classification", "text_classification")
MIN_OF_CLASS = FOLDS  # examples of the smallest class, so that each fold has one
EXAMPLES_AT_ONCE = 64
NOT_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class LabelProbe:
    """What the linear probe says of the labels.

    `accuracy` is that of the given labels, each judged by a probe that has not seen the example.
    """

    model: str
    accuracy: float
    doubts: list[DoubtedLabel]


@dataclass(frozen=True)
class CheckedData:
    """What was found in some data.

    Args:
        run: The run that names task, data and model.
        dataset: The dataset, without augmentation.
        classes: The names of what is counted: classes, labels, or groups of numbers.
        names: The examples as a person knows them: paths or texts, (n).
        splits: int64 (n,), the split of each example.
        counts: int64 (n, classes), how often each example has each class.
        image_sizes: int64 (n, 2), width and height, pixels; None for texts.
        lengths: int64 (n,), tokens of each text, cut at `model.length`; None for images.
        unreadable: One line for each image that cannot be read; they are not among the examples.
        blank: The rows of images with hardly more than one shade.
        equal: Groups of rows with equal pixels or texts, two in a group at least.
        similar: Pairs of rows that are nearly alike; no two of a group of `equal`.
        probe: None where labels cannot be doubted; `no_probe` says why.
    """

    run: Run
    dataset: Dataset
    classes: tuple[str, ...]
    names: tuple[str, ...]
    splits: NDArray[np.int64]
    counts: NDArray[np.int64]
    image_sizes: NDArray[np.int64] | None
    lengths: NDArray[np.int64] | None
    unreadable: tuple[str, ...]
    blank: list[int]
    equal: list[list[int]]
    similar: list[tuple[int, int]]
    probe: LabelProbe | None
    no_probe: str

    def take_pixels(self, row: int) -> Tensor | None:
        """An image as the model sees it, uint8 (3, height, width); None for texts."""
        for rows, source in parts_of(self.dataset, self.splits):
            places = np.flatnonzero(rows == row)
            if len(places):
                x = source.take(torch.from_numpy(places), 0).x
                return x[0].cpu() if isinstance(x, Tensor) and x.dim() == 4 else None
        return None


def examine_data(run: Run, device_context: DeviceContext) -> CheckedData:
    """Reads the data of a run and looks for what is wrong with them.

    Raises DataError where they cannot be read at all, SpaceError where their source splits by
    itself.
    """
    home = device_context.home
    keys = plugins.read_keys("data", run.data.name)
    plain: dict[str, Any] = {"augment": "none", "folds": 1, "fold": 0}
    options = {**run.data.options, **{k: v for k, v in plain.items() if k in keys.fields}}
    run = replace(run, data=replace(run.data, options=options))
    with forbid_downloads(True), examining_data() as record:
        input_spec = input_spec_of(run.model, home)
        load = plugins.load_plugin("data", run.data.name)
        dataset = load(home, input_spec, run.task.name, **keys.to_arguments(options))
        if record.items is None:
            raise SpaceError(
                f"data.name: {run.data.name} divides its examples by itself, so that they cannot "
                "be examined one by one; `tuner check` without --data reads them"
            )
        items = record.items
        is_image = record.image_sizes is not None
        classes, counts = count_classes(dataset, items)
        blank: list[int] = []
        similar: list[tuple[int, int]] = []
        if is_image:
            equal = group_pairs(record.equal_rows)
            blank, similar = compare_images(dataset, items.split, equal)
        else:
            equal, similar = compare_texts([as_text(example) for example in items.examples])
        try:
            probe, reason = probe_labels(run, dataset, items, device_context), ""
        except UnusableModel as error:
            probe, reason = None, str(error)
    return CheckedData(
        run,
        dataset,
        classes,
        tuple(name_example(example, row) for row, example in enumerate(items.examples)),
        items.split,
        counts,
        record.image_sizes,
        None if is_image else read_lengths(dataset, items.split),
        record.unreadable,
        blank,
        equal,
        similar,
        probe,
        reason,
    )


def name_example(example: Any, row: int) -> str:
    """A path, a text, or the number of an image that lies in no file of its own."""
    return f"image {row}" if isinstance(example, np.ndarray) else as_text(example)


def as_text(example: Any) -> str:
    return " | ".join(example) if isinstance(example, tuple) else str(example)


def parts_of(
    dataset: Dataset, splits: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Source]]:
    """The sources that together have every example once, each with the rows of its examples."""
    yield np.flatnonzero(np.isin(splits, (TRAIN, VALID))), dataset.full
    yield np.flatnonzero(splits == TEST), dataset.test


def read_lengths(dataset: Dataset, splits: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The tokens of each text, int64 (n,)."""
    lengths = np.zeros(len(splits), np.int64)
    for rows, source in parts_of(dataset, splits):
        if source.lengths is None:
            return None
        lengths[rows] = source.lengths.numpy()
    return lengths


def count_classes(dataset: Dataset, items: Items) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The names of what is counted, and how often each example has it, int64 (n, names).

    Objects are counted where an example has boxes, images where it has a mask, otherwise the
    stratum or the labels of the example.
    """
    if items.memberships is not None:
        return items.strata, items.memberships.astype(np.int64)
    if items.targets is None:
        objects = count_in_targets(dataset, items.split)
        if objects is not None:
            return dataset.classes, objects
    return items.strata, np.eye(len(items.strata), dtype=np.int64)[items.labels]


def count_in_targets(dataset: Dataset, splits: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The objects of each class, or whether a mask has a class; None: the targets are neither."""
    counts = np.zeros((len(splits), len(dataset.classes)), np.int64)
    for rows, source in parts_of(dataset, splits):
        for index in torch.split(torch.arange(len(source)), EXAMPLES_AT_ONCE):
            y = take_targets(source, index)
            if isinstance(y, dict) and "labels" in y:
                labels, most = y["labels"], None
            elif isinstance(y, Tensor) and y.dim() == 3:
                labels, most = y, 1
            else:
                return None
            for row, values in zip(rows[index.numpy()], labels.flatten(1).long(), strict=True):
                known = values[(values >= 0) & (values < len(dataset.classes))]
                found = torch.bincount(known, minlength=len(dataset.classes))
                counts[row] = found.clamp(max=most).numpy() if most else found.numpy()
    return counts


def take_targets(source: Source, index: Tensor) -> TensorTree:
    """The targets of some examples, without weights."""
    if isinstance(source, TargetSource):
        return split_weights(source.take_targets(index))[0]
    return split_weights(source.take(index, 0).y)[0]


def group_pairs(pairs: NDArray[np.int64] | None) -> list[list[int]]:
    """Groups of equal rows, from pairs of a row and the first row that equals it."""
    groups: dict[int, list[int]] = {}
    for row, first in [] if pairs is None else pairs.tolist():
        groups.setdefault(first, [first]).append(row)
    return list(groups.values())


def compare_images(
    dataset: Dataset, splits: NDArray[np.int64], equal: list[list[int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """The rows of blank images, and pairs of images that are nearly alike.

    Of equal images only the first is compared.
    """
    thumbnails = torch.zeros(len(splits), near_duplicates.SIDE**2)
    for rows, source in parts_of(dataset, splits):
        for index in torch.split(torch.arange(len(source)), EXAMPLES_AT_ONCE):
            x = source.take(index, 0).x
            assert isinstance(x, Tensor)
            thumbnails[torch.from_numpy(rows[index.numpy()])] = near_duplicates.make_thumbnails(x)
    blank = np.flatnonzero(near_duplicates.is_blank(thumbnails)).tolist()
    repeated = {row for group in equal for row in group[1:]}
    single = [row for row in range(len(splits)) if row not in repeated]
    pairs = near_duplicates.find_similar(thumbnails[single])
    return blank, [(single[first], single[second]) for first, second, _ in pairs]


def compare_texts(texts: list[str]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Groups of equal texts, and pairs that differ in case, spaces and punctuation alone."""
    exact: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        exact.setdefault(text, []).append(row)
    by_words: dict[str, list[int]] = {}
    for rows in exact.values():
        words = NOT_WORD.sub(" ", texts[rows[0]].casefold()).strip()
        if words:
            by_words.setdefault(words, []).append(rows[0])
    equal = [rows for rows in exact.values() if len(rows) > 1]
    return equal, [(rows[0], row) for rows in by_words.values() for row in rows[1:]]


def probe_labels(
    run: Run, dataset: Dataset, items: Items, device_context: DeviceContext
) -> LabelProbe:
    """Which labels a linear probe on the model's frozen features doubts.

    Raises UnusableModel, with the reason, where that cannot be said.
    """
    if run.task.name not in PROBED_TASKS:
        raise UnusableModel(f"only labels of classification are doubted, not {run.task.name}")
    smallest = int(np.bincount(items.labels, minlength=len(items.strata)).min())
    if smallest < MIN_OF_CLASS:
        raise UnusableModel(
            f"the smallest class has {smallest} examples, and {FOLDS} folds need {MIN_OF_CLASS}"
        )
    staged_model = build_probed_model(run, device_context, len(dataset.classes))
    if run.model.options.get("weights") == "none":
        raise UnusableModel("model.weights: none, so that its features say nothing")
    trunk, head = staged_model.split(staged_model.max_depth)
    head.eval()
    passes = [
        (
            torch.from_numpy(rows),
            compute_features(
                trunk,
                head,
                DeviceSource(source, dataset.input_spec, device_context),
                device_context,
            ).examples.inputs,
        )
        for rows, source in parts_of(dataset, items.split)
    ]
    order = torch.cat([rows for rows, _ in passes]).argsort()
    features = torch.cat([inputs for _, inputs in passes])[order.to(device_context.device)]
    labels = torch.from_numpy(items.labels)
    probabilities = estimate_out_of_fold(features, labels.to(features.device), len(items.strata))
    accuracy = float((probabilities.argmax(1) == labels).float().mean())
    return LabelProbe(run.model.name, accuracy, find_doubted_labels(probabilities, labels))

"""Your own images with a mask each: a folder of images and one of masks, matched by their names without the endings.

    path/images/a.jpg  path/masks/a.png                     split by us
    path/train/images/…  path/train/masks/…  path/valid/…   or path/images/train/…  path/masks/train/…: your own split

A mask is a PNG (or another lossless file) of its image's size, whose palette indices or grey values are class ids; 255 is ignored. Two
values such as 0 and 255 are background and foreground.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tuner.config.run import ImageOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, nearest_hint
from tuner.preprocessing.segmentation_dataset import (
    ImageMaskPair,
    MaskLegend,
    list_images_by_stem,
    raise_data_error,
    segmentation_dataset,
)
from tuner.preprocessing.splits import TEST, TRAIN, UNSPLIT, VALID

TASKS = ("segmentation",)

SPLIT_FOLDERS = {"train": TRAIN, "valid": VALID, "val": VALID, "validation": VALID, "test": TEST}
ImageAndMaskFolders = tuple[Path, Path]  # of images, of masks


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="the folder that holds the folders of images and of masks, or train/, valid/ and test/ with these"
        ),
    ],
    images: Annotated[str, Field(description="the folder of images, in path")] = "images",
    masks: Annotated[str, Field(description="the folder of masks, in path")] = "masks",
    classes: Annotated[
        list[str] | None, Field(description="names of the ids 0, 1, …; null: what is found")
    ] = None,
    ignore: Annotated[
        int, Field(ge=0, le=255, description="the value of pixels that count for nothing")
    ] = 255,
    colours: Annotated[
        list[str] | None,
        Field(description="of the classes, where masks are painted, such as '#ff0000'"),
    ] = None,
    image: ImageOptions,
) -> Dataset:
    root = Path(path).expanduser()
    if not root.is_dir():
        beside = (
            [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        )
        raise DataError(
            f"data.path: {path} is not a folder (looked in {Path.cwd()}){nearest_hint(root.name, beside)}"
        )
    parts = find_split_folders(root, images, masks)
    pairs: list[ImageMaskPair] = []
    part: list[int] = []
    for number, (of_images, of_masks) in parts.items():
        found = match_images_and_masks(of_images, of_masks)
        pairs += found
        part += [number] * len(found)
    numbers = np.array(part, np.int64)
    if TRAIN in parts and {VALID, TEST} - set(
        parts
    ):  # what is missing is taken from the training images
        numbers[numbers == TRAIN] = UNSPLIT
    legend = MaskLegend(
        tuple(classes) if classes else None, ignore, tuple(colours) if colours else None
    )
    return segmentation_dataset(home, pairs, numbers, image, input_spec, legend)


def find_split_folders(root: Path, images: str, masks: str) -> dict[int, ImageAndMaskFolders]:
    """The two folders of each part; of one UNSPLIT part where none is named. Raises DataError on twins, and without train."""
    found: dict[int, ImageAndMaskFolders] = {}
    for inner in (root, root / images):
        for folder in sorted(inner.iterdir()) if inner.is_dir() else ():
            if folder.is_dir() and folder.name.lower() in SPLIT_FOLDERS:
                both = (
                    (folder / images, folder / masks)
                    if inner == root
                    else (folder, root / masks / folder.name)
                )
                if SPLIT_FOLDERS[folder.name.lower()] in found:
                    raise DataError(
                        f"data.path: {folder} and {found[SPLIT_FOLDERS[folder.name.lower()]][0]} mean the same part; keep one"
                    )
                found[SPLIT_FOLDERS[folder.name.lower()]] = both
    if not found:
        return {UNSPLIT: (root / images, root / masks)}
    if TRAIN not in found:
        raise DataError(
            f"data.path: {root} has {', '.join(str(images) for images, _ in found.values())}, but no train"
        )
    return dict(sorted(found.items()))


def match_images_and_masks(of_images: Path, of_masks: Path) -> list[ImageMaskPair]:
    """Each image with its mask. Raises DataError naming images without a mask and masks without an image."""
    expected = "a folder of images and one of masks (data.images and data.masks name them)"
    images, masks = (
        list_images_by_stem(of_images, expected),
        list_images_by_stem(of_masks, expected),
    )
    alone = [
        f"{images[stem]}: no mask {of_masks / stem}.png" for stem in images.keys() - masks.keys()
    ]
    alone += [
        f"{masks[stem]}: no image {of_images / stem}.jpg" for stem in masks.keys() - images.keys()
    ]
    if alone:
        raise_data_error(
            sorted(alone),
            "images and masks have no partner of the same name (the ending may differ); add, rename or remove them",
        )
    return [(images[stem], masks[stem]) for stem in images]

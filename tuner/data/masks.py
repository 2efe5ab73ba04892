"""Your own images with a mask each: a folder of images and one of masks.

An image and its mask have the same name but for the ending. These layouts are read:

    path/images/a.jpg      path/masks/a.png                          split by a seed
    path/train/images/…    path/train/masks/…    path/valid/…        your own split
    path/images/train/…    path/masks/train/…    path/images/valid/… your own split

A mask is a PNG (or another lossless file) of its image's size. Its palette indices or grey values
are class ids; 255 is ignored. Two values such as 0 and 255 are background and foreground.
"""

import itertools
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tuner.config.data_options import ImageFileOptions
from tuner.core.input_spec import InputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError
from tuner.preprocessing.data_paths import resolve_folder
from tuner.preprocessing.image_files import warn_about_unread_files
from tuner.preprocessing.segmentation_dataset import (
    ImageMaskPair,
    MaskLegend,
    list_images_by_stem,
    raise_data_error,
    segmentation_dataset,
)
from tuner.preprocessing.splits import (
    TRAIN,
    UNSPLIT,
    group_by_split,
    require_one_per_split,
)

TASKS = ("segmentation",)

ImageAndMaskFolders = tuple[Path, Path]
"""The folder of the images and the folder of their masks."""


def load(
    home: Path,
    input_spec: InputSpec,
    task: str,
    *,
    path: Annotated[
        str,
        Field(
            description="the folder that holds the folders of images and of masks, "
            "or train/, valid/ and test/ with these"
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
    image: ImageFileOptions,
) -> Dataset:
    """Load images with a mask each.

    Args:
        home: the folder with the caches.
        input_spec: how the examples must look for the model's weights.
        task: `segmentation`.
        path: the folder that holds the folders of images and masks, or a folder per split.
        images: the name of the folders of images.
        masks: the name of the folders of masks.
        classes: the names of the ids 0, 1, …; None: the ids that occur.
        ignore: the value of pixels that belong to no class.
        colours: the colour of each class, if masks are painted in RGB.
        image: the image keys of the `data:` section.

    Raises:
        DataError: files are missing, unreadable or wrong.
    """
    root = resolve_folder(path, home=home)
    pairs: list[ImageMaskPair] = []
    split: list[int] = []
    split_folders = find_split_folders(root, images, masks)
    for number, (image_folder, mask_folder) in split_folders.items():
        split_pairs = match_images_and_masks(image_folder, mask_folder)
        pairs += split_pairs
        split += [number] * len(split_pairs)
    legend = MaskLegend(
        tuple(classes) if classes else None, ignore, tuple(colours) if colours else None
    )
    warnings = warn_about_unread_files(itertools.chain(*split_folders.values()))
    return segmentation_dataset(
        home, pairs, np.array(split, np.int64), image, input_spec, legend, warnings
    )


def find_split_folders(root: Path, images: str, masks: str) -> dict[int, ImageAndMaskFolders]:
    """The two folders of each split; of UNSPLIT alone where no split is named.

    Raises:
        DataError: two folders mean the same split, or none is for training.
    """
    inside = [root, root / images]
    folders = [
        child
        for folder in inside
        if folder.is_dir()
        for child in sorted(folder.iterdir())
        if child.is_dir()
    ]
    split_folders = require_one_per_split(group_by_split(folders), root)
    if not split_folders:
        return {UNSPLIT: (root / images, root / masks)}
    if TRAIN not in split_folders:
        names = ", ".join(map(str, split_folders.values()))
        raise DataError(f"data.path: {root} has {names}, but no train")
    return {
        split: (folder / images, folder / masks)
        if folder.parent == root
        else (folder, root / masks / folder.name)
        for split, folder in split_folders.items()
    }


def match_images_and_masks(image_folder: Path, mask_folder: Path) -> list[ImageMaskPair]:
    """Pair each image with the mask of the same name.

    Raises:
        DataError: images have no mask, or masks no image. The message names them.
    """
    expected = "a folder of images and one of masks (data.images and data.masks name them)"
    images = list_images_by_stem(image_folder, expected)
    masks = list_images_by_stem(mask_folder, expected)
    unmatched = [
        f"{images[stem]}: no mask {mask_folder / stem}.png" for stem in images.keys() - masks.keys()
    ]
    unmatched += [
        f"{masks[stem]}: no image {image_folder / stem}.jpg"
        for stem in masks.keys() - images.keys()
    ]
    if unmatched:
        raise_data_error(
            sorted(unmatched),
            "images and masks have no partner of the same name (the ending may differ); "
            "add, rename or remove them",
        )
    return [(images[stem], masks[stem]) for stem in images]

"""Images with the boxes of what is on them: checked, brought to the model's canvas, split, and ready."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.config.run import ImageOptions
from tuner.core.geometry import placed
from tuner.core.input_spec import Preprocess, Wanted
from tuner.core.targets import NO_OBJECT, Boxes
from tuner.core.types import Data
from tuner.errors import DataError
from tuner.preprocessing.image_dataset import assembled
from tuner.preprocessing.image_store import Store
from tuner.preprocessing.splits import PARTS, TRAIN, UNSPLIT, Items

LISTED = 10  # of a kind that a message names
STRATA = ("images with objects", "images without objects")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its objects. `boxes`: left, top, right, bottom in pixels, or in shares of the image's sides where `relative`.

    `labels` index the classes; `places` say where each object is written, as messages should name it. `size`: the image's width and
    height as the annotation has them.
    """

    picture: Path
    boxes: Sequence[Box]
    labels: Sequence[int]
    places: Sequence[str]
    part: int = UNSPLIT
    relative: bool = False
    size: tuple[int, int] | None = None


def detection(
    home: Path,
    annotated: Sequence[AnnotatedImage],
    classes: Sequence[str],
    options: ImageOptions,
    wanted: Wanted,
    warnings: Sequence[str] = (),
) -> Data:
    """Raises DataError on missing images, images named twice, no objects, empty or inverted boxes, and boxes beside their image."""
    _present(annotated)
    if not any(image.labels for image in annotated):
        raise DataError(
            f"data: {len(annotated)} images, but not one object on them; check the annotations"
        )
    bare = sum(not image.labels for image in annotated)
    found = [
        *warnings,
        *([f"data: {bare} of {len(annotated)} images have no objects"] if bare else []),
    ]
    by_picture = {image.picture: image for image in annotated}

    def truth(store: Store, items: Items, preprocess: Preprocess) -> Boxes:
        kept = [by_picture[picture] for picture in items.pictures]
        return on_canvas(kept, store.sizes, preprocess, found)

    data = assembled(home, _items(annotated), options, wanted, tuple(classes), truth)
    return replace(data, warnings=(*dict.fromkeys(found), *data.warnings))


def _present(annotated: Sequence[AnnotatedImage]) -> None:
    missing = [str(image.picture) for image in annotated if not image.picture.is_file()]
    if missing:
        raise DataError(
            *listed([f"{name}: there is no such image" for name in missing]),
            f"data: {len(missing)} images are missing",
        )
    counts: dict[Path, int] = defaultdict(int)
    for image in annotated:
        counts[image.picture] += 1
    twice = [f"{name}: named {n} times" for name, n in counts.items() if n > 1]
    if twice:
        raise DataError(
            *listed(twice), f"data: {len(twice)} images are named more than once; keep one of each"
        )


def _items(annotated: Sequence[AnnotatedImage]) -> Items:
    """Each part gets its share of images without objects, where there are enough of them to go round."""
    bare = np.array([not image.labels for image in annotated])
    labels = (
        bare.astype(np.int64)
        if bare.sum() > len(PARTS) and (~bare).sum() > len(PARTS)
        else np.zeros(len(bare), np.int64)
    )
    parts = np.array([image.part for image in annotated], np.int64)
    return Items(
        [image.picture for image in annotated],
        labels,
        STRATA[: 1 + int(labels.max(initial=0))],
        parts,
    )


def parts_of(given: NDArray[np.int64] | Sequence[int]) -> list[int]:
    """Parts as a data set states them; where it lacks one, that is taken from what trains."""
    parts = np.array(given, np.int64)
    if len(set(PARTS) - set(parts.tolist())) > 0:
        parts[parts == TRAIN] = UNSPLIT
    return [int(part) for part in parts]


def on_canvas(
    annotated: Sequence[AnnotatedImage],
    sizes: NDArray[np.int64],
    preprocess: Preprocess,
    warnings: list[str],
) -> Boxes:
    """The boxes where their images lie on the model's canvas. What reaches beyond its image is clipped, with a warning.

    Raises DataError naming every box that is empty, inverted, not finite, or wholly beside its image.
    """
    wrong: list[str] = []
    clipped: list[str] = []
    stated: list[str] = []
    most = max(1, *(len(image.labels) for image in annotated))
    boxes = np.zeros((len(annotated), most, 4), np.float32)
    labels = np.full((len(annotated), most), NO_OBJECT, np.int64)
    for row, (image, (width, height)) in enumerate(zip(annotated, sizes.tolist(), strict=True)):
        if image.size is not None and image.size != (width, height) and image.labels:
            stated.append(
                f"{image.places[0]}: the image is said to be {image.size[0]} x {image.size[1]} pixels, but is {width} x {height}"
            )
        at = placed(width, height, preprocess)
        for i, (box, place) in enumerate(zip(image.boxes, image.places, strict=True)):
            pixels = np.array(box) * (np.array([width, height] * 2) if image.relative else 1.0)
            problem = wrong_with(pixels, width, height)
            if problem:
                wrong.append(f"{place}: {problem}")
                continue
            inside = pixels.clip(0, [width, height] * 2)
            if np.abs(inside - pixels).max() > 1:  # a pixel is what conventions differ by
                clipped.append(
                    f"{place}: box {_said(pixels)} reaches beyond its image of {width} x {height} pixels"
                )
            boxes[row, i] = (
                inside * ([at.width / width, at.height / height] * 2) + [at.left, at.top] * 2
            )
        labels[row, : len(image.labels)] = image.labels
    if wrong:
        raise DataError(*listed(wrong), f"data: {len(wrong)} boxes are wrong; mend or remove them")
    if clipped:
        warnings += [
            f"data: {len(clipped)} boxes reach beyond their image and are clipped",
            *listed(clipped),
        ]
    if stated:
        warnings += [f"data: {len(stated)} images have another size than stated", *listed(stated)]
    return Boxes(torch.from_numpy(boxes), torch.from_numpy(labels), preprocess.size)


def wrong_with(box: NDArray[np.float64], width: int, height: int) -> str:
    """What makes a box of pixels useless; '' where nothing does."""
    left, top, right, bottom = box.tolist()
    if not np.isfinite(box).all():
        return f"box {_said(box)} is not made of finite numbers"
    if right < left or bottom < top:
        return f"box {_said(box)} is inverted: left, top, right, bottom"
    if right == left or bottom == top:
        return f"box {_said(box)} is empty"
    if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
        return f"box {_said(box)} lies wholly outside its image of {width} x {height} pixels"
    return ""


def _said(box: NDArray[np.float64]) -> str:
    return f"({', '.join(f'{side:g}' for side in box.tolist())})"


def inside(name: str, where: str) -> str:
    """A name of a file as an annotation states it. Raises DataError on one that leaves its folder, or that no file can have."""
    parts = name.replace("\\", "/").split("/")
    if (
        name.startswith(("/", "\\"))
        or ".." in parts
        or "\0" in name
        or not name.isprintable()
        or max(map(_bytes, parts)) > 255
    ):
        raise DataError(
            f"{where}: {name[:100]!r} leaves the folder of the images, or is no file's name; name files below it"
        )
    return name


def _bytes(part: str) -> int:
    return len(part.encode(errors="surrogatepass"))


def listed(problems: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = [f"… and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    return [*problems[:LISTED], *more]

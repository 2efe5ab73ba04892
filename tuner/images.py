"""Images decoded once, resized, and kept as uint8 in a memory-mapped file that workers and later runs share."""

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from tuner.core import Batch, Data, Preprocess
from tuner.errors import DataError
from tuner.files import disk_errors, locked
from tuner.run import ImageOptions

MAX_PIXELS = 50_000_000
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
TRAIN, VALID, TEST, UNSPLIT = 0, 1, 2, -1
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Items:
    """What a source of images lists. `pictures` are files, or arrays (h, w) or (h, w, 3) of uint8."""

    pictures: Sequence[Path | Pixels]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    part: NDArray[np.int64]  # TRAIN, VALID, TEST or UNSPLIT, for each picture


def resolve(options: ImageOptions, wanted: Preprocess) -> Preprocess:
    """What the file says, and for what it leaves open what the weights want. A new size keeps the crop's proportion."""
    size = options.size or wanted.size
    return Preprocess(
        size=size,
        resize=max(size, options.resize or round(size * wanted.resize / wanted.size)),
        interpolation=options.interpolation or wanted.interpolation,
        mean=options.mean or wanted.mean,
        std=options.std or wanted.std,
    )


def decode(picture: Path | Pixels, preprocess: Preprocess) -> Pixels:
    """One picture as RGB, (3, size, size) uint8; any mode, first frame, upright. Raises OSError or ValueError."""
    if isinstance(picture, Path):
        image: Image.Image = Image.open(picture)
    else:
        image = Image.fromarray(picture)
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        # a JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time; twice the wanted side keeps the detail
        image.draft("RGB", (2 * preprocess.resize, 2 * preprocess.resize))
        return _square(_rgb(ImageOps.exif_transpose(image)), preprocess)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _square(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """torchvision's Resize(resize) and CenterCrop(size)."""
    short, size = preprocess.resize, preprocess.size
    scale = short / min(image.size)
    width, height = (max(short, int(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), FILTERS[preprocess.interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


# -- the store


@dataclass(frozen=True)
class Store:
    """Decoded pixels, uint8 (n, 3, size, size), mapped from a file; `kept` are the items that could be read."""

    pixels: Tensor
    kept: NDArray[np.int64]
    digest: str
    warnings: tuple[str, ...]


def store(home: Path, items: Items, preprocess: Preprocess, on_bad_image: str) -> Store:
    """The items decoded, from the cache where an equal set was decoded before."""
    folder = home / "images" / _key(items, preprocess, on_bad_image)
    if not (folder / "meta.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not (folder / "meta.json").is_file():
                _build(folder, items, preprocess, on_bad_image)
    os.utime(folder)
    meta = json.loads((folder / "meta.json").read_text())
    shape = (len(meta["kept"]), 3, preprocess.size, preprocess.size)
    pixels = torch.from_file(str(folder / "pixels.bin"), shared=False, size=math.prod(shape), dtype=torch.uint8)
    return Store(pixels.view(shape), np.array(meta["kept"], np.int64), meta["digest"], tuple(meta["warnings"]))


def _key(items: Items, preprocess: Preprocess, on_bad_image: str) -> str:
    """Names the decoded set by path, size and time of each file (or by content, for arrays) and by the geometry."""
    seen = hashlib.sha256(f"2 {preprocess.size} {preprocess.resize} {preprocess.interpolation} {on_bad_image}".encode())
    for picture in items.pictures:
        if isinstance(picture, Path):
            stat = picture.stat()
            seen.update(f"{picture.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        else:
            seen.update(f"{picture.shape}".encode() + np.ascontiguousarray(picture).data)
    return seen.hexdigest()[:32]


def _build(folder: Path, items: Items, preprocess: Preprocess, on_bad_image: str) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder.parent))
    try:
        with disk_errors(folder):
            meta = _decode_all(temporary / "pixels.bin", items, preprocess, on_bad_image)
            (temporary / "meta.json").write_text(json.dumps(meta))
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decode_all(path: Path, items: Items, preprocess: Preprocess, on_bad_image: str) -> dict[str, Any]:
    kept: list[int] = []
    bad: list[str] = []
    seen = hashlib.sha256()

    def attempt(picture: Path | Pixels) -> Pixels | str:
        try:
            return decode(picture, preprocess)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            return f"{picture}: {str(error).replace(str(picture), 'this file')}"

    with warnings.catch_warnings(), open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(items.pictures), 512):  # bounded, so that a large set does not fill the memory
            for i, result in enumerate(pool.map(attempt, items.pictures[start : start + 512]), start):
                if isinstance(result, str):
                    bad.append(result)
                else:
                    data = np.ascontiguousarray(result).data
                    seen.update(data)
                    file.write(data)
                    kept.append(i)
        file.flush()
        os.fsync(file.fileno())
    seen.update(items.labels[kept].tobytes() + "\0".join(items.classes).encode(errors="surrogateescape"))
    return {"kept": kept, "digest": seen.hexdigest(), "warnings": _judge(bad, len(items.pictures), on_bad_image)}


def _judge(bad: list[str], total: int, on_bad_image: str) -> list[str]:
    """What to say of unreadable pictures. Raises DataError unless they may be skipped and are few."""
    if not bad:
        return []
    more = [f"… and {len(bad) - 10} more"] if len(bad) > 10 else []
    listed = [*bad[:10], *more]
    if on_bad_image == "skip" and len(bad) <= max(1, total // 100):
        return [f"data: {len(bad)} of {total} images cannot be read and are left out", *listed]
    way_out = "mend or remove them, or set data.on_bad_image: skip"
    if on_bad_image == "skip":
        way_out = "skip leaves out 1 % at most; mend or remove them"
    raise DataError(*listed, f"data: {len(bad)} of {total} images cannot be read; {way_out}")


# -- sources


@dataclass(frozen=True)
class Images:
    """Rows of a store as a Source: x uint8 (n, 3, size, size), y int64 (n,)."""

    pixels: Tensor
    labels: Tensor
    rows: Tensor
    flip: bool
    views: int | None
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor, view: int) -> Batch:
        rows = self.rows[index]
        x = self.pixels[rows]
        if self.flip:
            # half of the images face the other way, and the other half in the next view: a function of (index, view)
            mirrored = ((rows * 2654435761 >> 7) + view) % 2 == 1
            x[mirrored] = x[mirrored].flip(3)
        return Batch(x, self.labels[rows])


def dataset(home: Path, items: Items, options: ImageOptions, wanted: Preprocess) -> Data:
    """Items split, decoded and ready. Raises DataError on too few classes or images, and on unreadable images."""
    items = _limited(_split(_checked(items), options), options)
    preprocess = resolve(options, wanted)
    held = store(home, items, preprocess, options.on_bad_image)
    labels, part = torch.from_numpy(items.labels[held.kept]), items.part[held.kept]
    augmented = options.augment == "flip"

    def source(parts: Iterable[int], *, train: bool) -> Images:
        rows = torch.from_numpy(np.flatnonzero(np.isin(part, list(parts))))
        flip = augmented and train
        chosen = hashlib.sha256(rows.numpy().tobytes() + bytes([flip])).hexdigest()
        digest = hashlib.sha256(f"{held.digest} {chosen}".encode()).hexdigest()
        return Images(held.pixels, labels, rows, flip, options.views if flip else 1, digest)

    train, valid, test = source([TRAIN], train=True), source([VALID], train=False), source([TEST], train=False)
    full = source([TRAIN, VALID], train=True)
    digest = hashlib.sha256(f"{held.digest} {preprocess} {train.digest} {valid.digest} {test.digest}".encode()).hexdigest()
    return Data(train, valid, test, full, items.classes, preprocess, digest, held.warnings)


def _checked(items: Items) -> Items:
    counts = np.bincount(items.labels, minlength=len(items.classes))
    if len(items.classes) < 2:
        found = f"found {len(items.classes)} ({', '.join(map(repr, items.classes))})" if items.classes else "found none"
        raise DataError(f"data: classification needs at least 2 classes, {found}")
    if (counts == 0).any():
        empty = ", ".join(repr(c) for c, n in zip(items.classes, counts, strict=True) if n == 0)
        raise DataError(f"data: classes with 0 images: {empty}; add images or remove the folders")
    return items


def _split(items: Items, options: ImageOptions) -> Items:
    """UNSPLIT items become train, valid and test, each class in proportion, by the seed."""
    part = items.part.copy()
    has = {p: bool((part == p).any()) for p in (VALID, TEST)}
    shares = {p: share for p, share in ((VALID, options.valid), (TEST, options.test)) if not has[p]}
    few = []
    for label, name in enumerate(items.classes):
        free = np.flatnonzero((items.labels == label) & (part == UNSPLIT))
        if len(free) == 0:
            continue
        if len(free) <= len(shares):
            few.append(f"{name!r} has {len(free)}")
            continue
        order = np.random.default_rng([options.seed, label]).permutation(free)
        for p, share in shares.items():
            count = min(max(1, round(len(free) * share)), len(order) - 1)
            part[order[:count]] = p
            order = order[count:]
        part[order] = TRAIN
    if few:
        need = len(shares) + 1
        raise DataError(
            f"data: each class needs at least {need} images to be split, but {', '.join(few)}; add images or give the parts as folders"
        )
    return replace(items, part=part)


def _limited(items: Items, options: ImageOptions) -> Items:
    """At most `limit` items of each part, the classes in proportion."""
    if options.limit is None:
        return items
    keep: list[int] = []
    for part in (TRAIN, VALID, TEST):
        rows = np.flatnonzero(items.part == part)
        shuffled = np.random.default_rng([options.seed, 7, part]).permutation(rows)
        labels = items.labels[shuffled]
        # the i-th picture of a class ranks by its place within the class, so that cutting the list keeps proportions
        place = np.zeros(len(shuffled))
        for label in np.unique(labels):
            of_class = np.flatnonzero(labels == label)
            place[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
        keep += shuffled[np.argsort(place, kind="stable")][: options.limit].tolist()
    rows = np.sort(np.array(keep))
    pictures = [items.pictures[int(i)] for i in rows]
    return replace(items, pictures=pictures, labels=items.labels[rows], part=items.part[rows])

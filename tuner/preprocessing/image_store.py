"""Pictures decoded once and kept as uint8 in a memory-mapped file that workers and later runs share."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.core.input_spec import ImageInputSpec
from tuner.errors import DataError
from tuner.files.atomic import atomic_folder, disk_errors
from tuner.files.cache_entries import PinnedEntry, make_space, open_or_create, write_checksums
from tuner.preprocessing import image_decoding
from tuner.preprocessing.image_decoding import PathOrPixels

FORMAT_VERSION = 5  # of the stored files; another number is another store
MAX_LISTED = 10  # unreadable pictures that a message names


@dataclass(frozen=True)
class ImageStore:
    """`pixels`: uint8 (n, channels, size, size), mapped from a file. `kept`: which of the pictures could be read.

    `sizes`: int64 (n, 2), width and height of each as it was, upright. `same`: int64 (k, 2), a row and the first row of
    equal pixels, for each of the k rows that have such a one before them.

    Equal pixels have an equal `digest`, wherever the pictures lie. Whoever uses the pixels keeps `held`, lest they be removed.
    """

    entry: PinnedEntry
    pixels: Tensor
    readable: NDArray[np.int64]
    original_sizes: NDArray[np.int64]
    equal_rows: NDArray[np.int64]
    digest: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ImageDecoder:
    """How a picture becomes `channels` planes of pixels, or one line that says why not. Equal `name`, equal function."""

    name: str
    channels: int
    try_decode: Callable[[PathOrPixels, ImageInputSpec], NDArray[np.uint8] | str]


def _try_decode_rgb(picture: PathOrPixels, image_spec: ImageInputSpec) -> NDArray[np.uint8] | str:
    return image_decoding.try_decode(picture, image_spec)


RGB_DECODER = ImageDecoder("colour", 3, _try_decode_rgb)


def open_image_store(
    home: Path,
    pictures: Sequence[PathOrPixels],
    image_spec: ImageInputSpec,
    on_bad_image: str,
    decoder: ImageDecoder = RGB_DECODER,
) -> ImageStore:
    """The pictures decoded, from the cache where the same were decoded before. Raises DataError on unreadable ones."""
    folder = home / "images" / _store_key(pictures, image_spec, decoder)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = open_or_create(
            folder, lambda: _build_store(folder, pictures, image_spec, on_bad_image, decoder)
        )
        meta = json.loads((folder / "meta.json").read_text())
    pixels = torch.from_file(
        str(folder / "pixels.bin"), shared=False, size=math.prod(meta["shape"]), dtype=torch.uint8
    )
    warnings = _check_unreadable(
        meta["bad"], len(pictures), on_bad_image, folder / "unreadable.txt"
    )
    kept, sizes, same = (np.array(meta[key], np.int64) for key in ("kept", "sizes", "same"))
    return ImageStore(
        held,
        pixels.view(meta["shape"]),
        kept,
        sizes.reshape(-1, 2),
        same.reshape(-1, 2),
        meta["digest"],
        tuple(warnings),
    )


def _store_key(
    pictures: Sequence[PathOrPixels], image_spec: ImageInputSpec, decoder: ImageDecoder
) -> str:
    """Names a decoded set by path, size and time of each file (by content, for arrays) and by the geometry."""
    geometry = f"{image_spec.size} {image_spec.resize} {image_spec.interpolation} {image_spec.fit}"
    seen = hashlib.sha256(f"{FORMAT_VERSION} {decoder.name} {geometry}\n".encode())
    for picture in pictures:
        if isinstance(picture, Path):
            try:
                stat = picture.stat()
                state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
            except OSError as error:  # a broken link is an unreadable picture like others
                state = f"error {error.errno}"
            seen.update(os.fsencode(f"{os.path.abspath(picture)}\0{state}\n"))
        else:
            seen.update(f"{picture.shape}".encode() + np.ascontiguousarray(picture).data)
    return seen.hexdigest()[:32]


def _build_store(
    folder: Path,
    pictures: Sequence[PathOrPixels],
    image_spec: ImageInputSpec,
    on_bad_image: str,
    decoder: ImageDecoder,
) -> None:
    need = len(pictures) * decoder.channels * image_spec.size**2
    make_space(folder.parent, need)
    with atomic_folder(folder, need, "images") as temporary:
        meta = _decode_all(temporary / "pixels.bin", pictures, image_spec, decoder)
        _check_unreadable(meta["bad"], len(pictures), on_bad_image, folder / "unreadable.txt")
        (temporary / "unreadable.txt").write_text(
            "".join(f"{line}\n" for line in meta["bad"]), errors="surrogateescape"
        )
        (temporary / "meta.json").write_text(json.dumps(meta))
        write_checksums(temporary, {"pixels.bin": meta["digest"]})


def _decode_all(
    path: Path, pictures: Sequence[PathOrPixels], image_spec: ImageInputSpec, decoder: ImageDecoder
) -> dict[str, Any]:
    kept: list[int] = []
    sizes: list[tuple[int, int]] = []
    bad: list[str] = []
    same: list[tuple[int, int]] = []
    rows: dict[bytes, int] = {}  # the first row of each content
    seen = hashlib.sha256()
    with (
        image_decoding.silence_pillow(),
        open(path, "wb") as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for start in range(
            0, len(pictures), 512
        ):  # bounded, so that a large set does not fill the memory
            chunk = pictures[start : start + 512]
            for i, result in enumerate(
                pool.map(lambda picture: decoder.try_decode(picture, image_spec), chunk), start
            ):
                if isinstance(result, str):
                    bad.append(result)
                else:
                    data = np.ascontiguousarray(result).data
                    seen.update(data)
                    file.write(data)
                    row = len(kept)
                    first = rows.setdefault(hashlib.blake2b(data, digest_size=16).digest(), row)
                    if first != row:
                        same.append((row, first))
                    kept.append(i)
                    sizes.append(image_decoding.upright_size(pictures[i]))
    shape = [len(kept), decoder.channels, image_spec.size, image_spec.size]
    return {
        "shape": shape,
        "kept": kept,
        "sizes": sizes,
        "same": same,
        "bad": bad,
        "digest": seen.hexdigest(),
    }


def _check_unreadable(
    bad: Sequence[str], total: int, on_bad_image: str, list_file: Path
) -> list[str]:
    """What to say of unreadable pictures. Raises DataError unless they may be skipped and are few."""
    if not bad:
        return []
    listed = list(bad[:MAX_LISTED])
    if len(bad) > MAX_LISTED:
        listed.append(f"… and {len(bad) - MAX_LISTED} more")
    said = f"data: {len(bad)} of {total} images cannot be read"
    if on_bad_image == "skip" and len(bad) <= max(1, total // 100):
        return [f"{said} and are left out; {list_file} lists them", *listed]
    way_out = "mend or remove them, or set data.on_bad_image: skip"
    if on_bad_image == "skip":
        way_out = "skip leaves out 1 % at most (of fewer than 100, one); mend or remove them"
    raise DataError(*listed, f"{said}; {way_out}")

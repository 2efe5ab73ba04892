"""Decodes images once and stores them as uint8 in a memory-mapped file for all later runs.

Where they would not fit the disk, they are decoded each time that they are taken.
"""

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.core.input_spec import ImageInputSpec
from tuner.errors import DataError, limit_listing
from tuner.files.atomic import atomic_folder, disk_errors
from tuner.files.cache_entries import (
    PinnedEntry,
    disk_usage,
    make_space,
    open_or_create,
    write_checksums,
)
from tuner.preprocessing import image_decoding
from tuner.preprocessing.image_decoding import PathOrPixels

FORMAT_VERSION = 7  # of the stored files; another number is another store
LEAVE_OUT_ALL = "leave out all"  # of `on_bad_image`: unreadable images are told by the store alone
IMAGES_PER_CHUNK = 512  # decoded at once, so that a large dataset does not fill the memory


@dataclass(frozen=True)
class ImageStore:
    """Decoded images.

    Args:
        entry: the cache entry. Keep it as long as the pixels are used, so that it is not evicted.
        pixels: uint8 (n, channels, size, size), mapped from a file; or what decodes them.
        readable: int64 (n,), the indices of the images that could be read.
        original_sizes: int64 (n, 2), width and height in pixels of each upright image as it was.
        equal_rows: int64 (k, 2), a row and the first row with equal pixels, for each of the k rows
            whose pixels an earlier row has too.
        digest: equal pixels have an equal digest, wherever the files lie.
        warnings: about images that were left out.
        grey_bits: the bits of grey of the images that have more than 8; None: none has.
        unreadable: one line for each image that cannot be read.
    """

    entry: PinnedEntry
    pixels: "Tensor | StreamedPixels"
    readable: NDArray[np.int64]
    original_sizes: NDArray[np.int64]
    equal_rows: NDArray[np.int64]
    digest: str
    warnings: tuple[str, ...]
    grey_bits: int | None
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageDecoder:
    """How an image becomes pixels, uint8 (channels, size, size).

    Args:
        name: equal names, equal functions; it is part of the key of the store.
        channels: the number of channels.
        try_decode: gives the pixels, or one line that says why the image cannot be read.
    """

    name: str
    channels: int
    try_decode: Callable[[PathOrPixels, ImageInputSpec], NDArray[np.uint8] | str]


@dataclass(frozen=True)
class StreamedPixels:
    """Images that are decoded each time that they are taken.

    Args:
        pictures: the images, each of which could be read before.
        image_spec: the canvas.
        decoder: how an image becomes pixels.
    """

    pictures: Sequence[PathOrPixels]
    image_spec: ImageInputSpec
    decoder: ImageDecoder

    def take(self, rows: Tensor) -> Tensor:
        """The images at `rows` (int64, of any shape, on the CPU): uint8 (*, channels, size, size).

        Raises:
            DataError: an image can no longer be read.
        """
        chosen = [self.pictures[row] for row in rows.flatten().tolist()]
        with image_decoding.silence_pillow():
            results = list(_decoding_pool().map(self._decode, chosen))
        pixels = torch.from_numpy(np.stack(results))
        return pixels.view(*rows.shape, *pixels.shape[1:])

    def _decode(self, picture: PathOrPixels) -> NDArray[np.uint8]:
        result = self.decoder.try_decode(picture, self.image_spec)
        if isinstance(result, str):
            raise DataError(f"{result}; it could be read before: restore it, or start again")
        return result


@functools.cache
def _decoding_pool() -> ThreadPoolExecutor:
    """Threads, as Pillow decodes and resizes without Python's lock."""
    return ThreadPoolExecutor(os.cpu_count(), "decode")


def _try_decode_rgb(picture: PathOrPixels, image_spec: ImageInputSpec) -> NDArray[np.uint8] | str:
    return image_decoding.try_decode(picture, image_spec)


RGB_DECODER = ImageDecoder("colour", 3, _try_decode_rgb)


def open_image_store(
    home: Path,
    pictures: Sequence[PathOrPixels],
    image_spec: ImageInputSpec,
    on_bad_image: str,
    decoder: ImageDecoder = RGB_DECODER,
    *,
    may_stream: bool = False,
) -> ImageStore:
    """Decode images, or take them from the cache if the same images were decoded before.

    Args:
        home: the folder with the caches.
        pictures: the images.
        image_spec: the canvas. Where it states bits of grey, these are taken, and not those that
            the images have.
        on_bad_image: `error`, `skip` to leave out a few unreadable images, or LEAVE_OUT_ALL.
        decoder: how an image becomes pixels.
        may_stream: whether images that would not fit the disk are decoded each time that they are
            taken. They are decoded once to check them, and what is known of them is kept.

    Raises:
        DataError: images are unreadable and may not be left out.
    """
    folder = home / "images" / _store_key(pictures, image_spec, decoder)
    byte_count = len(pictures) * decoder.channels * image_spec.size**2
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        is_streamed = may_stream and not folder.is_dir() and not fits_disk(folder, byte_count)
        if is_streamed:
            folder = folder.with_name(f"{folder.name}-1")
            byte_count = 0
        entry = open_or_create(
            folder,
            lambda: _build_store(folder, pictures, image_spec, on_bad_image, decoder, byte_count),
        )
        meta = json.loads((folder / "meta.json").read_text())
    warnings = _check_unreadable(
        meta["bad"], len(pictures), on_bad_image, folder / "unreadable.txt"
    )
    if is_streamed:
        warnings.append(_streaming_note(len(pictures), math.prod(meta["shape"])))
    return ImageStore(
        entry,
        _stream(pictures, image_spec, decoder, meta)
        if is_streamed
        else _map_pixels(folder, meta["shape"]),
        readable=np.array(meta["kept"], np.int64),
        original_sizes=np.array(meta["sizes"], np.int64).reshape(-1, 2),
        equal_rows=np.array(meta["same"], np.int64).reshape(-1, 2),
        digest=meta["digest"],
        warnings=tuple(warnings),
        grey_bits=meta["grey_bits"],
        unreadable=tuple(meta["bad"]),
    )


def stored_pixels(store: ImageStore) -> Tensor:
    """The pixels of a store that was opened without `may_stream`."""
    assert isinstance(store.pixels, Tensor)
    return store.pixels


def fits_disk(folder: Path, byte_count: int) -> bool:
    """Whether images may take so many bytes: at most the half of what the disk has for them."""
    free = shutil.disk_usage(folder.parent).free
    return byte_count <= (disk_usage(folder.parent) + free) / 2


def _streaming_note(count: int, byte_count: int) -> str:
    return (
        f"data: {count:,} decoded images would take {byte_count / 1e9:.1f} GB, more than half of "
        "what the disk has for them; they are decoded anew in each epoch, which is slower; lower "
        "data.size, or set TUNER_HOME to a larger disk"
    )


def _map_pixels(folder: Path, shape: Sequence[int]) -> Tensor:
    size = math.prod(shape)
    flat = torch.from_file(str(folder / "pixels.bin"), shared=False, size=size, dtype=torch.uint8)
    return flat.view(shape)


def _stream(
    pictures: Sequence[PathOrPixels],
    image_spec: ImageInputSpec,
    decoder: ImageDecoder,
    meta: dict[str, Any],
) -> StreamedPixels:
    readable = [pictures[row] for row in meta["kept"]]
    return StreamedPixels(readable, replace(image_spec, grey_bits=meta["grey_bits"]), decoder)


def _store_key(
    pictures: Sequence[PathOrPixels], image_spec: ImageInputSpec, decoder: ImageDecoder
) -> str:
    """The name of a store: by path, size and time of each file, and by the geometry.

    Arrays count by their content.
    """
    geometry = f"{image_spec.size} {image_spec.resize} {image_spec.interpolation} {image_spec.fit}"
    if image_spec.grey_bits is not None:
        geometry += f" {image_spec.grey_bits} bits"
    digest = hashlib.sha256(f"{FORMAT_VERSION} {decoder.name} {geometry}\n".encode())
    absolute = functools.cache(os.path.abspath)  # of the few folders of many files
    for picture in pictures:
        if isinstance(picture, Path):
            path = os.fspath(picture)
            try:
                stat = os.stat(path)
                state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
            except OSError as error:  # a broken link is an unreadable image like others
                state = f"error {error.errno}"
            name = path.rpartition("/")[2]
            folder = absolute(path[: len(path) - len(name)])
            digest.update(os.fsencode(f"{folder}/{name}\0{state}\n"))
        else:
            digest.update(f"{picture.shape}".encode() + np.ascontiguousarray(picture).data)
    return digest.hexdigest()[:32]


def _build_store(
    folder: Path,
    pictures: Sequence[PathOrPixels],
    image_spec: ImageInputSpec,
    on_bad_image: str,
    decoder: ImageDecoder,
    byte_count: int,
) -> None:
    """Decode the images; with a `byte_count` of 0 only what is known of them is kept."""
    make_space(folder.parent, byte_count)
    with atomic_folder(folder, byte_count, "images") as temporary:
        pixels_file = temporary / "pixels.bin" if byte_count else Path(os.devnull)
        meta = _decode_all(pixels_file, pictures, image_spec, decoder)
        _check_unreadable(meta["bad"], len(pictures), on_bad_image, folder / "unreadable.txt")
        (temporary / "unreadable.txt").write_text(
            "".join(f"{line}\n" for line in meta["bad"]), errors="surrogateescape"
        )
        (temporary / "meta.json").write_text(json.dumps(meta))
        write_checksums(temporary, {pixels_file.name: meta["digest"]})


def _decode_all(
    path: Path, pictures: Sequence[PathOrPixels], image_spec: ImageInputSpec, decoder: ImageDecoder
) -> dict[str, Any]:
    """Decode the images into a file; what is known about them, as `meta.json` has it."""
    kept: list[int] = []
    sizes: list[tuple[int, int]] = []
    unreadable: list[str] = []
    equal_rows: list[tuple[int, int]] = []
    first_rows: dict[bytes, int] = {}  # the first row of each content
    digest = hashlib.sha256()
    with (
        image_decoding.silence_pillow(),
        open(path, "wb") as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        grey_bits = image_spec.grey_bits or _find_grey_bits(pictures, pool)
        image_spec = replace(image_spec, grey_bits=grey_bits)
        for start in range(0, len(pictures), IMAGES_PER_CHUNK):
            chunk = pictures[start : start + IMAGES_PER_CHUNK]
            results = pool.map(lambda picture: decoder.try_decode(picture, image_spec), chunk)
            for i, result in enumerate(results, start):
                if isinstance(result, str):
                    unreadable.append(result)
                    continue
                data = np.ascontiguousarray(result).data
                digest.update(data)
                file.write(data)
                row = len(kept)
                content = hashlib.blake2b(data, digest_size=16).digest()
                first = first_rows.setdefault(content, row)
                if first != row:
                    equal_rows.append((row, first))
                kept.append(i)
                sizes.append(image_decoding.upright_size(pictures[i]))
    return {
        "shape": [len(kept), decoder.channels, image_spec.size, image_spec.size],
        "kept": kept,
        "sizes": sizes,
        "same": equal_rows,
        "bad": unreadable,
        "digest": digest.hexdigest(),
        "grey_bits": grey_bits,
    }


def _find_grey_bits(pictures: Sequence[PathOrPixels], pool: ThreadPoolExecutor) -> int | None:
    """The bits of the highest grey value of all images with more than 8 bits; None: there are none.

    One number for the whole set, since an image alone does not tell: a dark one of 16 bits has
    values as one of 8 bits, and the brightest of 12 bits would be a sixteenth of white.
    """
    highest = max(pool.map(image_decoding.highest_grey, pictures), default=0)
    return image_decoding.bits_of_grey(highest) if highest else None


def _check_unreadable(
    unreadable: Sequence[str], total: int, on_bad_image: str, list_file: Path
) -> list[str]:
    """Warnings about unreadable images. Raises DataError unless they may be skipped and are few."""
    if not unreadable or on_bad_image == LEAVE_OUT_ALL:
        return []
    listed = limit_listing(unreadable)
    summary = f"data: {len(unreadable)} of {total} images cannot be read"
    if on_bad_image == "skip" and len(unreadable) <= max(1, total // 100):
        return [f"{summary} and are left out; {list_file} lists them", *listed]
    advice = "mend or remove them, or set data.on_bad_image: skip"
    if on_bad_image == "skip":
        advice = "skip leaves out 1 % at most (of fewer than 100, one); mend or remove them"
    raise DataError(*listed, f"{summary}; {advice}")

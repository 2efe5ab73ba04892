"""Unpacks data sets once, into the cache: zip and tar archives, and what libraries hold in files
of their own.

An archive may come from anywhere, so nothing is written outside its own folder of the cache, and no
more than a limit.
"""

import hashlib
import json
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tuner.errors import DataError
from tuner.files.atomic import atomic_folder, disk_errors, require_free_space
from tuner.files.cache_entries import PinnedEntry, make_space, open_or_create, write_checksums
from tuner.preprocessing.splits import SPLIT_BY_NAME

FORMAT_VERSION = 1  # of the unpacked folders; another number is another folder
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ARCHIVE_SUFFIXES = (".zip", *TAR_SUFFIXES)
MAX_BYTES = 500_000_000_000  # of all files of an archive
MAX_RATIO = 200  # of these to the archive, from MIN_BYTES_OF_RATIO on: a larger one is a bomb
MIN_BYTES_OF_RATIO = 1_000_000_000
MAX_FILES = 5_000_000
FILES, LISTING = "files", "listing.json"  # in an entry

_pinned: dict[Path, PinnedEntry] = {}  # images are read as long as this process lives


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of an archive which `unpack_archive` reads."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack_archive(home: Path, archive: Path) -> Path:
    """The folder with the content of an archive: of a folder in it, where that is all it has.

    Raises:
        DataError: the archive is damaged, encrypted or too large, or a name in it leads out of it.
    """
    state = archive.stat()
    key = f"{os.path.abspath(archive)}\0{state.st_size} {state.st_mtime_ns} {state.st_ino}"
    extract = _extract_zip if archive.name.lower().endswith(".zip") else _extract_tar

    def write(folder: Path) -> None:
        try:
            extract(archive, folder)
        except (
            zipfile.BadZipFile,
            tarfile.TarError,
            zlib.error,
            lzma.LZMAError,
            EOFError,
            NotImplementedError,
        ) as error:
            raise DataError(
                f"data.path: {archive}: cannot be unpacked ({error}); is it truncated? unpack it "
                "by hand and name the folder"
            ) from None

    return _skip_single_folders(unpack_once(home, key, write))


def unpack_once(home: Path, key: str, write: Callable[[Path], None]) -> Path:
    """The folder that `write` fills, made once for each key and kept in the cache.

    Args:
        home: the folder with the caches.
        key: what is unpacked; equal keys, equal content.
        write: writes the files into the empty folder that it gets.
    """
    name = hashlib.sha256(f"{FORMAT_VERSION} {key}".encode(errors="surrogateescape")).hexdigest()
    entry = home / "unpacked" / name[:32]

    def create() -> None:
        make_space(entry.parent, 0)
        with atomic_folder(entry, None, "images") as temporary:
            (temporary / FILES).mkdir()
            write(temporary / FILES)
            sizes = {
                str(path.relative_to(temporary / FILES)): path.stat().st_size
                for path in sorted((temporary / FILES).rglob("*"))
                if path.is_file()
            }
            (temporary / LISTING).write_text(json.dumps(sizes))
            # the files themselves are checked when they are decoded
            write_checksums(temporary)

    with disk_errors(entry):
        entry.parent.mkdir(parents=True, exist_ok=True)
        _pinned[entry] = open_or_create(entry, create)
    return entry / FILES


def _skip_single_folders(folder: Path) -> Path:
    """The first folder that has more than one folder in it, or one whose name means a split."""
    while True:
        children = [child for child in folder.iterdir() if not child.name.startswith(".")]
        if len(children) != 1 or not children[0].is_dir():
            return folder
        if children[0].name.lower() in SPLIT_BY_NAME:
            return folder
        folder = children[0]


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = [info for info in file.infolist() if _is_wanted(info.filename)]
        _check_limits(archive, folder, [info.file_size for info in members])
        for info in members:
            name = info.filename.replace("\\", "/")
            target = (folder / name).resolve()
            if name.startswith("/") or not target.is_relative_to(folder.resolve()):
                raise DataError(_leads_out(archive, info.filename))
            if info.flag_bits & 1:
                raise DataError(
                    f"data.path: {archive}: {info.filename!r} is encrypted; unpack it by hand and "
                    "name the folder"
                )
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"data.path: {archive}: {info.filename!r} is a link; leave it out")
            if info.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open(info) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


def _extract_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        members = [member for member in file if _is_wanted(member.name)]
        _check_limits(archive, folder, [member.size for member in members])
        try:
            file.extractall(folder, members, filter="data")
        except tarfile.FilterError as error:
            raise DataError(_leads_out(archive, error.tarinfo.name)) from None


def _leads_out(archive: Path, name: str) -> str:
    return (
        f"data.path: {archive}: {name!r} leads out of the archive, or is no file or folder; "
        "nothing was unpacked; make the archive anew from the folder itself"
    )


def _is_wanted(name: str) -> bool:
    """Whether a member is data: macOS adds a second file to each."""
    parts = name.split("/")
    return parts[0] != "__MACOSX" and parts[-1] != ".DS_Store"


def _check_limits(archive: Path, folder: Path, sizes: list[int]) -> None:
    """Raise DataError where the content is too large for its archive, StorageError for the disk."""
    total, packed = sum(sizes), archive.stat().st_size
    is_bomb = total > MIN_BYTES_OF_RATIO and total > MAX_RATIO * packed
    if total > MAX_BYTES or len(sizes) > MAX_FILES or is_bomb:
        raise DataError(
            f"data.path: {archive}: {packed:,} bytes that become {total:,} in {len(sizes):,} "
            f"files; at most {MAX_FILES:,} files and {MAX_BYTES:,} bytes are unpacked, and "
            f"{MAX_RATIO} times the archive; unpack it by hand if you trust it, and name the folder"
        )
    require_free_space(folder, total, f"unpacking {archive.name}")

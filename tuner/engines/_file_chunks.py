"""Files of a folder in pieces of bounded size, for a machine that does not see the folder.

Only names and bytes are sent.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tuner.errors import DataError
from tuner.files import removal
from tuner.files.atomic import disk_errors, fsync

CHUNK_BYTES = 64 * 2**20  # bytes of a chunk

FilePiece = tuple[str, int, bytes, bool]
"""A file's name below its folder, where the bytes begin, the bytes, whether they are the last.

The name of a folder ends with a slash.
"""

FolderState = dict[str, tuple[int, int]]
"""What a folder holds: name -> when it was written, bytes."""


def folder_state(folder: Path) -> FolderState:
    """Return the files of a folder and of its subfolders, the oldest first.

    So the file that was written last also arrives last.
    """
    found: FolderState = {}
    for name in list_names(folder):
        if not name.endswith("/"):
            state = (folder / name).stat()
            found[name] = (state.st_mtime_ns, state.st_size)
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def list_names(folder: Path) -> Iterator[str]:
    """Yield files and folders below `folder`. Links are followed, once.

    Half-written files (`.x.tmp`) are left out.
    """
    been = set()
    for place, below, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in been:
            below.clear()
            continue
        been.add(here)
        below[:] = sorted(name for name in below if not _is_partial(name))
        start = os.path.relpath(place, folder)
        for name in (*(f"{name}/" for name in below), *sorted(files)):
            if not _is_partial(name) and (name.endswith("/") or Path(place, name).is_file()):
                yield os.path.normpath(os.path.join(start, name)) + "/" * name.endswith("/")


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith((".tmp", ".arriving"))


def read_chunks(folder: Path, file_names: Iterable[str]) -> Iterator[list[FilePiece]]:
    """Yield files in chunks of CHUNK_BYTES: small files share one, a large file gets several."""
    chunk: list[FilePiece] = []
    size = 0
    for name in file_names:
        if name.endswith("/"):
            chunk.append((name, 0, b"", True))
            continue
        with open(folder / name, "rb") as file:
            last = False
            while not last:
                begin, data = file.tell(), file.read(CHUNK_BYTES - size)
                last = len(data) < CHUNK_BYTES - size
                chunk.append((name, begin, data, last))
                size += len(data)
                if not last:
                    yield chunk
                    chunk, size = [], 0
    if chunk:
        yield chunk


def write_chunk(folder: Path, chunk: Iterable[FilePiece]) -> None:
    """Write pieces below `folder`. A file gets its name when its last piece is there.

    Raises:
        DataError: A name would leave the folder.
        StorageError: The disk refuses the files.
    """
    for name, begin, data, last in chunk:
        path = folder / name
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise DataError(f"{name!r} would leave the folder {folder}")
        with disk_errors(path):
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                continue
            temporary = path.with_name(f".{path.name}.arriving")
            with open(temporary, "r+b" if begin else "wb") as file:
                file.seek(begin)
                file.write(data)
            if last:
                fsync(temporary)
                removal.put(temporary, path)

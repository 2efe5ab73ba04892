"""Entries of the caches.

Folders whose files are known by their SHA-256, held by who reads them, the least recently used
removed first.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from tuner.files import removal
from tuner.files.atomic import file_lock, file_sha256, flock, lock_path, remove_leftovers
from tuner.files.removal import SUMS

UNUSED_DAYS = 60  # after which an entry goes when another is made

FileStates = tuple[tuple[str, int, int, int], ...]
_verified_states: dict[
    Path, FileStates
] = {}  # what this process has read through; hashing costs about half a second a gigabyte


class PinnedEntry:
    """A whole entry that nobody removes while this object lives.

    The kernel frees its lock, however the process ends.
    """

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder = folder
        weakref.finalize(self, os.close, handle)


def write_checksums(folder: Path, known_digests: Mapping[str, str] | None = None) -> None:
    """Vouches for what a folder holds.

    `known`: the SHA-256 of files that were hashed while they were written.
    """
    known_digests = known_digests or {}
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    (folder / SUMS).write_text(
        json.dumps({name: known_digests.get(name) or file_sha256(folder / name) for name in names})
    )


def open_or_create(folder: Path, create: Callable[[], None]) -> PinnedEntry:
    """The entry in `folder`, made where there is none, or a damaged one, which is said on stderr.

    By one process where several ask.
    """
    held = try_open(folder)
    if held is None:
        with file_lock(lock_path(folder)):
            held = try_open(folder)
            if held is None:
                if folder.is_dir():
                    warning = (
                        f"{folder} is damaged ({find_damage(folder) or 'locked'}); it is made anew"
                    )
                    print(f"tuner: warning: {warning}", file=sys.stderr, flush=True)
                create()
                held = try_open(folder, just_written=True)
    assert held is not None  # nobody removes what its lock's holder has just made
    return held


def try_open(folder: Path, *, just_written: bool = False) -> PinnedEntry | None:
    """The entry in `folder`, checked when this process opens it first.

    None: there is none, or a damaged one.

    `written`: by this process just now, so that it need not be read again.
    """
    try:
        handle = os.open(folder / SUMS, os.O_RDONLY)
    except OSError:
        return None
    try:
        flock(handle, folder / SUMS, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), (folder / SUMS).stat()):
            raise FileNotFoundError(folder)
    except (BlockingIOError, FileNotFoundError):  # it is being removed
        os.close(handle)
        return None
    if find_damage(folder, just_written=just_written):
        os.close(handle)
        return None
    os.utime(folder)
    return PinnedEntry(folder, handle)


def find_damage(folder: Path, *, just_written: bool = False) -> str:
    """What an entry's files lack of what it says of them; '' where nothing.

    What has not changed since is not read again.
    """
    try:
        sums: dict[str, str] = dict(json.loads((folder / SUMS).read_text()))
    except (OSError, ValueError, TypeError):
        return f"{SUMS} cannot be read"
    try:
        state = tuple((name, *_file_state(folder / name)) for name in (SUMS, *sums))
    except (OSError, TypeError, ValueError):
        return f"a file that {SUMS} names is missing"
    if not just_written and _verified_states.get(folder) != state:
        for name, digest in sums.items():
            if file_sha256(folder / name) != digest:
                return f"{name} differs from its SHA-256"
    _verified_states[folder] = state
    return ""


def _file_state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def evict_entry(folder: Path) -> bool:
    """Removes an entry, unless somebody reads or makes it, or it is none."""
    if folder.is_dir() and not removal.is_entry(folder):
        return False
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(file_lock(lock_path(folder), wait=False)):
            return False
        with contextlib.suppress(FileNotFoundError):  # one that was never finished has no readers
            file = stack.enter_context(open(folder / SUMS, "r+b"))
            try:
                flock(file, folder / SUMS, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        gone = folder.with_name(
            f".{folder.name}.tmp"
        )  # first out of sight, so that a kill leaves no half of it there
        removal.remove_entry(gone)
        with contextlib.suppress(FileNotFoundError):
            removal.put(folder, gone)
        removal.remove_entry(gone)
        removal.remove_lock(lock_path(folder))
        return True


def list_entries(parent: Path) -> list[Path]:
    """The least recently used first."""
    found = (
        [(path.stat().st_mtime, path) for path in parent.glob("[!.]*") if path.is_dir()]
        if parent.is_dir()
        else []
    )
    return [path for _, path in sorted(found)]


def disk_usage(path: Path) -> int:
    """The bytes of a file, or of a folder and all in it."""
    inner = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    total = 0
    for one in inner:
        with contextlib.suppress(OSError):  # it may go while we look
            total += one.lstat().st_size if not one.is_dir() else 0
    return total


def evict_until_fits(parent: Path, bytes_needed: float, byte_limit: float) -> bool:
    """Removes the least recently used entries until `need` more bytes fit `limit`.

    False: what is being read or made leaves no room.
    """
    used = disk_usage(parent)
    for entry in list_entries(parent):
        if used + bytes_needed <= byte_limit:
            break
        taken = disk_usage(entry)
        if evict_entry(entry):
            used -= taken
    return used + bytes_needed <= byte_limit


def make_space(parent: Path, bytes_needed: float) -> None:
    """Room for an entry that must be made, whatever the disk.

    What killed processes left goes, and what was not used for long, and what was used least
    recently until this cache takes no more than half of what the disk has for it.
    """
    remove_leftovers(parent)
    for entry in list_entries(parent):
        if time.time() - entry.stat().st_mtime > UNUSED_DAYS * 86_400:
            evict_entry(entry)
    evict_until_fits(
        parent, bytes_needed, 0.5 * (disk_usage(parent) + shutil.disk_usage(parent).free)
    )

"""Entries of the caches: folders whose files are known by their SHA-256, held by who reads them, the least recently used removed first."""

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
from tuner.files.atomic import flock, lock_of, locked, sha256, sweep
from tuner.files.removal import SUMS

UNUSED_DAYS = 60  # after which an entry goes when another is made

State = tuple[tuple[str, int, int, int], ...]
_checked: dict[
    Path, State
] = {}  # what this process has read through; hashing costs about half a second a gigabyte


class Held:
    """A whole entry that nobody removes while this object lives: the kernel frees its lock, however the process ends."""

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder = folder
        weakref.finalize(self, os.close, handle)


def seal(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Vouches for what a folder holds. `known`: the SHA-256 of files that were hashed while they were written."""
    known = known or {}
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    (folder / SUMS).write_text(
        json.dumps({name: known.get(name) or sha256(folder / name) for name in names})
    )


def opened(folder: Path, make: Callable[[], None]) -> Held:
    """The entry in `folder`, made where there is none, or a damaged one, which is said on stderr; by one process where several ask."""
    held = hold(folder)
    if held is None:
        with locked(lock_of(folder)):
            held = hold(folder)
            if held is None:
                if folder.is_dir():
                    warning = (
                        f"{folder} is damaged ({wrong_with(folder) or 'locked'}); it is made anew"
                    )
                    print(f"tuner: warning: {warning}", file=sys.stderr, flush=True)
                make()
                held = hold(folder, written=True)
    assert held is not None  # nobody removes what its lock's holder has just made
    return held


def hold(folder: Path, *, written: bool = False) -> Held | None:
    """The entry in `folder`, checked when this process opens it first. None: there is none, or a damaged one.

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
    if wrong_with(folder, written=written):
        os.close(handle)
        return None
    os.utime(folder)
    return Held(folder, handle)


def wrong_with(folder: Path, *, written: bool = False) -> str:
    """What an entry's files lack of what it says of them; '' where nothing. What has not changed since is not read again."""
    try:
        sums: dict[str, str] = dict(json.loads((folder / SUMS).read_text()))
    except (OSError, ValueError, TypeError):
        return f"{SUMS} cannot be read"
    try:
        state = tuple((name, *_state(folder / name)) for name in (SUMS, *sums))
    except (OSError, TypeError, ValueError):
        return f"a file that {SUMS} names is missing"
    if not written and _checked.get(folder) != state:
        for name, digest in sums.items():
            if sha256(folder / name) != digest:
                return f"{name} differs from its SHA-256"
    _checked[folder] = state
    return ""


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def evict(folder: Path) -> bool:
    """Removes an entry, unless somebody reads or makes it, or it is none."""
    if folder.is_dir() and not removal.is_entry(folder):
        return False
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(locked(lock_of(folder), wait=False)):
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
        removal.remove_lock(lock_of(folder))
        return True


def entries(parent: Path) -> list[Path]:
    """The least recently used first."""
    found = (
        [(path.stat().st_mtime, path) for path in parent.glob("[!.]*") if removal.is_entry(path)]
        if parent.is_dir()
        else []
    )
    return [path for _, path in sorted(found)]


def size(path: Path) -> int:
    """The bytes of a file, or of a folder and all in it."""
    inner = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    total = 0
    for one in inner:
        with contextlib.suppress(OSError):  # it may go while we look
            total += one.lstat().st_size if not one.is_dir() else 0
    return total


def make_room(parent: Path, need: float, limit: float) -> bool:
    """Removes the least recently used entries until `need` more bytes fit `limit`. False: what is being read or made leaves no room."""
    used = size(parent)
    for entry in entries(parent):
        if used + need <= limit:
            break
        taken = size(entry)
        if evict(entry):
            used -= taken
    return used + need <= limit


def tidy(parent: Path, need: float) -> None:
    """Room for an entry that must be made, whatever the disk: what killed processes left goes, and what was not used for long, and what was
    used least recently until this cache takes no more than half of what the disk has for it."""
    sweep(parent)
    for entry in entries(parent):
        if time.time() - entry.stat().st_mtime > UNUSED_DAYS * 86_400:
            evict(entry)
    make_room(parent, need, 0.5 * (size(parent) + shutil.disk_usage(parent).free))

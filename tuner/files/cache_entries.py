"""Entries of the caches: folders whose files are known by their SHA-256.

A reader pins an entry, so that nobody evicts it. The least recently used entry is evicted first.
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

VERDICT = "verified.json"  # in an entry: how its files were when they were last read through
VERDICT_DAYS = 7  # after which they are read through again, as disks can lose bits
UNUSED_DAYS = 60  # after which an entry goes when another is made

FileStates = tuple[tuple[str, int, int, int, int], ...]
_verified_states: dict[
    Path, FileStates
] = {}  # what this process has read through; hashing costs about half a second a gigabyte


class PinnedEntry:
    """A whole entry that nobody evicts while this object lives.

    The kernel frees its lock however the process ends.
    """

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder = folder
        weakref.finalize(self, os.close, handle)


def write_checksums(folder: Path, known_digests: Mapping[str, str] | None = None) -> None:
    """Writes the checksum file, which vouches for the other files of a folder, but not for those
    in folders inside it.

    `known_digests`: the SHA-256 of the files that were hashed while they were written.
    """
    known_digests = known_digests or {}
    files = (path for path in folder.iterdir() if path.is_file())
    names = sorted(path.name for path in files if path.name not in (SUMS, VERDICT))
    (folder / SUMS).write_text(
        json.dumps({name: known_digests.get(name) or file_sha256(folder / name) for name in names})
    )


def open_or_create(folder: Path, create: Callable[[], None]) -> PinnedEntry:
    """Opens the entry in `folder`, and creates it where there is none or a damaged one.

    A warning on stderr says that an entry is damaged. Where several processes ask, one creates it.
    """
    entry = try_open(folder)
    if entry is None:
        with file_lock(lock_path(folder)):
            entry = try_open(folder)
            if entry is None:
                if folder.is_dir():
                    warning = (
                        f"{folder} is damaged ({find_damage(folder) or 'locked'}); it is made anew"
                    )
                    print(f"tuner: warning: {warning}", file=sys.stderr, flush=True)
                create()
                entry = try_open(folder, just_written=True)
    assert entry is not None  # nobody removes what its lock's holder has just made
    return entry


def try_open(folder: Path, *, just_written: bool = False) -> PinnedEntry | None:
    """The entry in `folder`; None where there is none or it is damaged.

    Files are read through when they are opened for the first time on this machine, when they have
    changed since, and every VERDICT_DAYS days. `just_written`: this process has just written them,
    so they need not be read again.
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
    """What is wrong with an entry's files; an empty text if nothing is.

    Files that have not changed since they were last read are not read again.
    """
    try:
        sums: dict[str, str] = dict(json.loads((folder / SUMS).read_text()))
    except (OSError, ValueError, TypeError):
        return f"{SUMS} cannot be read"
    try:
        state = tuple((name, *_file_state(folder / name)) for name in (SUMS, *sums))
    except (OSError, TypeError, ValueError):
        return f"a file that {SUMS} names is missing"
    if _verified_states.get(folder) == state:
        return ""
    if just_written or _read_verdict(folder) != state:
        unread = {} if just_written else sums
        for name, digest in unread.items():
            if file_sha256(folder / name) != digest:
                return f"{name} differs from its SHA-256"
        _write_verdict(folder, state)
    _verified_states[folder] = state
    return ""


def _read_verdict(folder: Path) -> FileStates | None:
    """How the files were when they were read through; None where that is unknown or long ago."""
    try:
        age = time.time() - (folder / VERDICT).stat().st_mtime
        rows = json.loads((folder / VERDICT).read_text())
        return tuple(map(tuple, rows)) if 0 <= age < VERDICT_DAYS * 86_400 else None
    except (OSError, ValueError, TypeError):
        return None


def _write_verdict(folder: Path, state: FileStates) -> None:
    with contextlib.suppress(OSError):  # a cache that is read-only is read through each time
        (folder / VERDICT).write_text(json.dumps(state))


def _file_state(path: Path) -> tuple[int, int, int, int]:
    stat = path.stat()  # the last one is set by every change, and by no program at will
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def evict_entry(folder: Path) -> bool:
    """Removes an entry, unless a process reads or makes it, or the folder is no entry."""
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
        hidden = folder.with_name(
            f".{folder.name}.tmp"
        )  # first out of sight, so that a kill leaves no half of it there
        removal.remove_entry(hidden)
        with contextlib.suppress(FileNotFoundError):
            removal.put(folder, hidden)
        removal.remove_entry(hidden)
        removal.remove_lock(lock_path(folder))
        return True


def list_entries(parent: Path) -> list[Path]:
    """The entries of a cache, the least recently used first."""
    by_age = (
        [(path.stat().st_mtime, path) for path in parent.glob("[!.]*") if path.is_dir()]
        if parent.is_dir()
        else []
    )
    return [path for _, path in sorted(by_age)]


def disk_usage(path: Path) -> int:
    """The bytes of a file, or of a folder and everything in it."""
    inner = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    total = 0
    for file in inner:
        with contextlib.suppress(OSError):  # it may go while we look
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def evict_until_fits(parent: Path, bytes_needed: float, byte_limit: float) -> bool:
    """Evicts the least recently used entries until `bytes_needed` more fit `byte_limit`.

    False: the entries that are being read or made leave too little space.
    """
    used = disk_usage(parent)
    for entry in list_entries(parent):
        if used + bytes_needed <= byte_limit:
            break
        entry_bytes = disk_usage(entry)
        if evict_entry(entry):
            used -= entry_bytes
    return used + bytes_needed <= byte_limit


def make_space(parent: Path, bytes_needed: float) -> None:
    """Makes space for an entry that must be made, whatever the disk has.

    It removes what killed processes left, the entries unused for `UNUSED_DAYS` days, and then the
    least recently used ones, until this cache takes at most half of what the disk has for it.
    """
    remove_leftovers(parent)
    for entry in list_entries(parent):
        if time.time() - entry.stat().st_mtime > UNUSED_DAYS * 86_400:
            evict_entry(entry)
    evict_until_fits(
        parent, bytes_needed, 0.5 * (disk_usage(parent) + shutil.disk_usage(parent).free)
    )

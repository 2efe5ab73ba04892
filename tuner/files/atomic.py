"""Files that are whole or absent.

A file or folder is written beside its final path, synced, and renamed. Locks are the kernel's.
Digests name the content.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tuner.errors import StorageError
from tuner.files import removal
from tuner.files.crash_points import crash_point


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # some file systems cannot sync a folder; a file that cannot be synced is a real failure
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(
    path: Path,
    mode: int = 0o644,
    crash_prefix: str = "file",
    *,
    bytes_needed: float | None = None,
    sync: bool = True,
) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends without an error, else vanishes.

    `crash_prefix` begins the names of its crash points. `bytes_needed`: the bytes to be written,
    where they are known. Without `sync`, a power cut may leave a torn file. What a killed process
    left is removed by the next `remove_leftovers`. Raises StorageError when the disk is full or the
    path cannot be written.
    """
    with disk_errors(path, bytes_needed), _locked_temporary_file(path.parent) as temporary:
        try:
            crash_point(f"{crash_prefix}.begun")
            yield temporary
            crash_point(f"{crash_prefix}.written")
            if sync:
                fsync(temporary)  # data first
            crash_point(f"{crash_prefix}.synced")
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(mode & ~mask)
            removal.put(temporary, path)  # then the name
            crash_point(f"{crash_prefix}.renamed")
            if sync:
                fsync(path.parent)  # then the entry
        except BaseException:
            removal.remove_file(temporary)
            raise


@contextlib.contextmanager
def _locked_temporary_file(folder: Path) -> Iterator[Path]:
    """A new file, locked while it is written, so that `remove_leftovers` does not remove it."""
    while True:
        try:
            handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        except FileNotFoundError:
            what = "takes no files" if folder.is_dir() else "is no folder; make it"
            raise StorageError(f"{folder} {what}, or write elsewhere") from None
        with open(handle, "rb") as file:
            flock(file, Path(name), fcntl.LOCK_EX)
            if _is_same_file(file, Path(name)):  # else it was swept before it was locked
                yield Path(name)
                return


def _is_same_file(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the file at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextlib.contextmanager
def atomic_folder(
    folder: Path, bytes_needed: float | None = None, crash_prefix: str = "folder"
) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error.

    Only the process that has the lock of `folder` may build it. A killed build leaves a `.tmp`
    folder that the next build of the same folder, or `remove_leftovers`, removes. `bytes_needed`:
    the bytes that the folder will hold, where they are known; `crash_prefix` begins the names of
    its crash points.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    with disk_errors(folder, bytes_needed):
        for leftover in (temporary, folder):
            removal.remove_entry(leftover)
        temporary.mkdir()
        crash_point(f"{crash_prefix}.begun")
        try:
            yield temporary
            crash_point(f"{crash_prefix}.filled")
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            removal.put(temporary, folder)
            crash_point(f"{crash_prefix}.renamed")
            fsync(folder.parent)
        finally:
            removal.remove_entry(temporary)


@contextlib.contextmanager
def half_export(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for an export that is being written.

    It is locked, so that `remove_leftovers` does not remove it. What has its name when the block
    ends is removed: a half-written export, or one that was replaced.
    """
    temporary = parent / f".export-{uuid.uuid4().hex[:8]}.tmp"
    lock = temporary.with_suffix(".lock")
    with file_lock(lock):
        try:
            temporary.mkdir()
            yield temporary
        finally:
            removal.remove_half_export(temporary)
            removal.remove_lock(lock)


def lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def lock_of_export(folder: Path) -> Path:
    """The lock file in which the process is written that makes an export for `folder`."""
    return folder.with_name(f".{folder.name}.lock")


def remove_leftovers(parent: Path) -> None:
    """Removes what killed processes left in `parent`.

    That is half-written files and folders, and locks of folders that do not exist.
    """
    sweep_exports(parent)
    for leftover in parent.glob(".*.tmp"):
        if removal.is_entry(leftover):
            with file_lock(parent / f"{leftover.name[1:-4]}.lock", wait=False) as locked:
                if locked:  # else it is being built right now
                    removal.remove_entry(leftover)
        elif leftover.is_file():
            with contextlib.suppress(OSError), open(leftover, "rb") as file:
                flock(
                    file, leftover, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # raises where it is being written now
                removal.remove_file(leftover)
    for lock in parent.glob("[!.]*.lock"):
        if removal.is_entry_name(lock.stem) and not lock.with_suffix("").exists():
            remove_unused_lock(lock)


def sweep_exports(parent: Path) -> None:
    """Removes the exports that killed processes were writing in `parent`, and their locks."""
    for leftover in parent.glob(".export-*.tmp"):
        remove_unused_lock(leftover.with_suffix(".lock"), leftover)
    for lock in parent.glob(".export-*.lock"):
        if removal.EXPORT_LOCK.fullmatch(lock.name):
            remove_unused_lock(lock)


def remove_unused_lock(lock: Path, half: Path | None = None) -> None:
    """Removes a lock that nobody holds; before it the half-written export `half`, if it had one."""
    with file_lock(lock, wait=False) as ours:
        if ours:
            if half is not None:
                removal.remove_half_export(half)
            removal.remove_lock(lock)


def flock(file: IO[Any] | int, path: Path, how: int) -> None:
    """Takes the kernel's lock on the open file at `path`.

    Raises BlockingIOError where another process has it, StorageError where the file system has no
    locks.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path}: its file system has no locks ({error.strerror}), so two processes could "
            "write the same place; mount it with them (Lustre: -o flock), or use another disk "
            "(--studies, --out, TUNER_HOME)"
        ) from None


@contextlib.contextmanager
def claimed(path: Path, busy: str, *, remove: bool = False) -> Iterator[None]:
    """Holds the lock at `path`, in which the holder is written.

    `remove`: the lock file is removed at the end. Raises StorageError where another process has the
    lock: the text `busy`, with that process for {holder}.
    """
    while True:
        with disk_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with open(handle, "r+") as file:
            try:
                flock(file, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read().strip() or "another process"
                raise StorageError(busy.format(holder=holder)) from None
            if not _is_same_file(file, path):  # its last holder removed it a moment ago
                continue
            if not removal.is_holder(file.read()):
                raise StorageError(
                    f"{path} is no lock of tuner's; move it away, or write elsewhere"
                )
            # not through the file's buffer, which closing the file would write again
            with disk_errors(path):
                os.ftruncate(file.fileno(), 0)
                os.pwrite(file.fileno(), _holder().encode(), 0)
            try:
                yield
            finally:
                if remove:
                    removal.remove_lock(path)
            return


def write_note(path: Path, content: Any) -> None:
    """Writes a small JSON file, whole or not at all, and makes its folder. Raises StorageError."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, crash_prefix="note") as temporary:
            temporary.write_text(json.dumps(content))


def _holder() -> str:
    return f"pid {os.getpid()} on host {socket.gethostname()} since {time.strftime('%H:%M')}"


@contextlib.contextmanager
def disk_errors(path: Path, bytes_needed: float | None = None) -> Iterator[None]:
    """Turns a full disk, a quota or a missing permission into a StorageError.

    The message names the path, and the bytes where they are known.
    """
    try:
        yield
    except StorageError:
        raise
    except (
        Exception
    ) as error:  # libraries written in other languages say a full disk in words of their own
        reason = _disk_full_reason(error)
        if reason:
            needed = (
                f"{max(1, round(bytes_needed / 1e6)):,} MB needed: "
                if bytes_needed is not None
                else ""
            )
            raise StorageError(
                f"disk full while writing {path} ({needed}{reason}); free some space, such as by "
                "`tuner clean`, and run the same command"
            ) from error
        if isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.EEXIST,
        ):
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        raise


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _disk_full_reason(error: BaseException | None) -> str:
    """Why a disk takes no more, if the error or one of its causes says so; else an empty text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return os.strerror(error.errno)
        for number in DISK_FULL_ERRNOS:
            if f"os error {number}" in str(error) or os.strerror(number) in str(
                error
            ):  # safetensors, tokenizers
                return os.strerror(number)
        if "PytorchStreamWriter failed writing" in str(error):
            return "torch could not write all of it"
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock at `path`; the kernel frees it when its holder ends, however it ends.

    Yields True while the lock is held. Without `wait` it yields False where another process has it.
    """
    while True:
        with open(path, "a+") as file:
            try:
                flock(file, path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if _is_same_file(
                file, path
            ):  # else its last holder removed it, and others lock the next
                yield True
                return


def require_free_space(folder: Path, bytes_needed: float, reason: str) -> None:
    """Raises StorageError, with the reason, unless the disk of `folder` has `bytes_needed` free."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise StorageError(
            f"disk: {folder} has {free / 1e6:,.0f} MB free, but {bytes_needed / 1e6:,.0f} MB are "
            f"needed ({reason}); "
            "free some space, such as by `tuner clean`, or use another disk"
        )

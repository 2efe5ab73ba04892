"""Files that are whole or absent: written beside their place, synced, renamed; downloaded so; locked by the kernel; known by digest."""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from tuner.crash import crash
from tuner.errors import DataError, StorageError

OFFLINE: ContextVar[bool] = ContextVar("OFFLINE", default=False)  # set where nothing may be downloaded
PATIENCE = 30.0  # seconds without a byte after which a download is given up


@contextlib.contextmanager
def offline(on: bool) -> Iterator[None]:
    """Nothing is downloaded within, where `on`."""
    token = OFFLINE.set(on)
    try:
        yield
    finally:
        OFFLINE.reset(token)


def sha256(path: Path) -> str:
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
def atomic_path(path: Path, mode: int = 0o644, what: str = "file", *, need: float | None = None, sync: bool = True) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    `what` begins the names of its crash points, `need` is the bytes to be written, where they are known. Without `sync` a power
    cut may tear it. Raises StorageError when the disk is full or the place cannot be written.
    """
    with disk_errors(path, need):
        handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            crash(f"{what}.begun")
            yield temporary
            crash(f"{what}.written")
            if sync:
                fsync(temporary)  # data first
            crash(f"{what}.synced")
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(mode & ~mask)
            temporary.replace(path)  # then the name
            crash(f"{what}.renamed")
            if sync:
                fsync(path.parent)  # then the entry
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well; only who holds `folder`'s lock may build it.

    A killed build leaves a `.tmp` that the next build of the same folder, or `sweep`, removes.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    with disk_errors(folder):
        for rest in (temporary, folder):
            shutil.rmtree(rest, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def sweep(parent: Path) -> None:
    """Removes what killed builds left in `parent`."""
    for rest in parent.glob(".*.tmp"):
        with locked(parent / f"{rest.name[1:-4]}.lock", wait=False) as ours:
            if ours:  # else it is being built right now
                shutil.rmtree(rest, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path, need: float | None = None) -> Iterator[None]:
    """Turns a full disk, a quota or a missing permission into a StorageError that names the path, and the bytes where they are known."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            needed = f"{max(1, round(need / 1e6)):,} MB needed: " if need is not None else ""
            raise StorageError(
                f"disk full while writing {path} ({needed}{error.strerror}); free some space and run the same command"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        raise


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock at `path`; the kernel frees it when its holder ends, however it ends.

    With `wait` it is true inside; without, it may be false: someone else has the lock.
    """
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def download(url: str, path: Path, what: str, algorithm: str = "sha256", begin: str = "") -> None:
    """The file behind `url`, whole at `path` or not at all; its digest must begin with `begin`.

    Raises DataError that says how to place the file by hand, StorageError when it cannot be written.
    """
    if OFFLINE.get():
        raise DataError(f"{what}: {path} is not there yet; `tuner run` downloads it from {url}")
    name = algorithm.upper().replace("SHA256", "SHA-256")
    known = f" (its {name} begins with {begin})" if begin else ""
    by_hand = f"fetch it elsewhere{known} and place it at {path}"
    request = urllib.request.Request(url, headers={"User-Agent": "tuner"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer, atomic_path(path) as temporary:
            digest = _copy(answer, temporary, algorithm)
            if not digest.startswith(begin):
                raise DataError(f"{what}: {url} has {name} {digest}, expected {begin}…; nothing was kept; {by_hand}")
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise DataError(f"{what}: cannot download {url}: {error}; {by_hand}") from None
    except (OSError, http.client.HTTPException) as error:  # OSError covers urllib's URLError and time-outs
        raise DataError(f"{what}: cannot download {url}: {error}; {by_hand}") from None


def _copy(answer: http.client.HTTPResponse, path: Path, algorithm: str) -> str:
    """Writes the answer's body and returns its digest. Raises OSError when the connection ended early."""
    seen, size = hashlib.new(algorithm, usedforsecurity=False), 0
    with open(path, "wb") as file:
        while chunk := answer.read(1 << 20):
            seen.update(chunk)
            file.write(chunk)
            size += len(chunk)
    promised = answer.headers.get("Content-Length")
    if promised is not None and size != int(promised):
        raise ConnectionError(f"the connection ended after {size:,} of {int(promised):,} bytes")
    return seen.hexdigest()

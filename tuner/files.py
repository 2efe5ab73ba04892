"""Files that are whole or absent: written beside their place, synced, renamed; locked by the kernel; known by SHA-256."""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tuner.errors import StorageError


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
def atomic_path(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    Raises StorageError when the disk is full or the place cannot be written.
    """
    with disk_errors(path):
        handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            fsync(temporary)  # data first
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(mode & ~mask)
            temporary.replace(path)  # then the name
            fsync(path.parent)  # then the entry
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a quota or a missing permission into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(f"disk full while writing {path} ({error.strerror}); free some space and run the same command") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock at `path`; the kernel frees it when its holder ends, however it ends."""
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

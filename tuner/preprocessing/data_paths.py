"""Finds the files of a dataset on the disk, and says what is missing."""

from pathlib import Path

from tuner.errors import DataError, nearest_path_hint
from tuner.preprocessing.unpacked_data import ARCHIVE_SUFFIXES, is_archive, unpack_archive


def resolve_path(given: str, home: Path | None = None) -> Path:
    """The file or folder that `data.path` names.

    Args:
        given: the path as the user wrote it.
        home: the folder with the caches, to which an archive is unpacked; None: it is a file as
            others.

    Raises:
        DataError: nothing is there. The message names the nearest name beside it. Or an archive
            cannot be unpacked.
    """
    path = Path(given).expanduser()
    if not path.exists():
        raise DataError(f"data.path: {given} {_does_not_exist(path)}")
    if home is not None and path.is_file() and is_archive(path):
        return unpack_archive(home, path)
    return path


def resolve_folder(
    given: str, expected: str = "a folder", home: Path | None = None, key: str = "data.path"
) -> Path:
    """The folder that `data.path`, or another key, names.

    Args:
        given: the path as the user wrote it.
        home: as `resolve_path` has it.
        expected: what the folder must be, for the message if it is a file.
        key: the key that has the path.

    Raises:
        DataError: nothing is there, or it is a file.
    """
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        if home is not None and is_archive(folder):
            return unpack_archive(home, folder)
        archives = f", or an archive ({', '.join(ARCHIVE_SUFFIXES)})" if home is not None else ""
        raise DataError(f"{key}: {given} is a file; expected {expected}{archives}")
    raise DataError(f"{key}: {given} {_does_not_exist(folder, folders_only=True)}")


def _does_not_exist(path: Path, *, folders_only: bool = False) -> str:
    hint = nearest_path_hint(path, folders_only=folders_only)
    return f"does not exist (looked in {Path.cwd()}){hint}"

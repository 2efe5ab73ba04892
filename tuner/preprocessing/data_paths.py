"""Finds the files of a dataset on the disk, and says what is missing."""

from pathlib import Path

from tuner.errors import DataError, nearest_path_hint


def resolve_path(given: str) -> Path:
    """The file or folder that `data.path` names.

    Raises:
        DataError: nothing is there. The message names the nearest name beside it.
    """
    path = Path(given).expanduser()
    if not path.exists():
        raise DataError(f"data.path: {given} {_does_not_exist(path)}")
    return path


def resolve_folder(given: str, expected: str = "a folder", key: str = "data.path") -> Path:
    """The folder that `data.path`, or another key, names.

    Args:
        given: the path as the user wrote it.
        expected: what the folder must be, for the message if it is a file.
        key: the key that has the path.

    Raises:
        DataError: nothing is there, or it is a file.
    """
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{key}: {given} is a file; expected {expected}")
    raise DataError(f"{key}: {given} {_does_not_exist(folder, folders_only=True)}")


def _does_not_exist(path: Path, *, folders_only: bool = False) -> str:
    hint = nearest_path_hint(path, folders_only=folders_only)
    return f"does not exist (looked in {Path.cwd()}){hint}"

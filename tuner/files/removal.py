"""The one module that removes files: tuner removes only what it made, and knows it by a mark.

A mark is a name that nobody else gives (a digest, or random characters between fixed ones), the
manifest of an export, the digests of a cache entry, or the first line of a file that tuner wrote.
What has no mark stays, whatever folder it is in.
"""

import atexit
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tuner.errors import StorageError, limit_listing
from tuner.files.crash_points import crash_point
from tuner.files.exchange import exchanged
from tuner.files.tracker_folders import is_tracker_folder

MANIFEST = "manifest.json"  # of an export, written last: the SHA-256 of its other files
SUMS = "sha256.json"  # of a cache's entry, written last: the SHA-256 of its other files
HEADERS = {"space.yaml": "# what study ", "best.yaml": "# trial "}  # how the files of a study begin
REPORTS = ("report.html", "report.md")  # of a study, in its folder
REPORT_HEADER = "<!-- tuner's report of study "  # how they begin
HALF_FILE = re.compile(r"\.([a-z0-9_]{8}|[0-9a-f]{32})\.tmp")
HALF_EXPORT = re.compile(r"\.export-[a-z0-9_]{8}\.tmp")
EXPORT_LOCK = re.compile(r"\.export-[a-z0-9_]{8}\.lock")
ENTRY = re.compile(r"[0-9a-f]{32}(-\d+)?")
NOTE = re.compile(r"[0-9a-f]{32}\.cost\.json")
CHECKPOINT = re.compile(r"(\d+|best)-([0-9a-f]{64})\.safetensors")
ENQUEUED = re.compile(r"enqueued-\d{20}-[0-9a-f]{8}\.json")
TESTED_RUN = re.compile(r"default-test-([0-9a-f]{64})\.safetensors")
ARTIFACT = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(\.\w+)?")
DATABASE = re.compile(r"study\.db(-wal|-shm|-journal)?")
HOLDER = re.compile(r"(pid \d+ on host .*)?")  # what a lock file holds: nothing, or who has it


def remove_file(path: Path) -> bool:
    """Removes a half-written file, a checkpoint or an enqueued trial, by its mark, if it is one."""
    marked = any(mark.fullmatch(path.name) for mark in (HALF_FILE, CHECKPOINT, NOTE, ENQUEUED))
    if marked or _half_arrived(path):
        path.unlink(missing_ok=True)
        return True
    return False


def _half_arrived(path: Path) -> bool:
    """Whether a file is a checkpoint that was on its way from another machine."""
    return bool(re.fullmatch(rf"\.{CHECKPOINT.pattern}\.arriving", path.name))


def remove_lock(path: Path) -> None:
    """Removes a lock file; only the process that holds the lock may call this."""
    with contextlib.suppress(OSError):
        if is_holder(path.read_text(errors="replace")):
            path.unlink()


def is_holder(text: str) -> bool:
    """Whether a lock file of tuner may have this content."""
    return HOLDER.fullmatch(text.strip()) is not None


def remove_dangling(link: Path) -> None:
    """Removes a link that points to nothing."""
    if link.is_symlink() and not link.exists():
        link.unlink(missing_ok=True)


def put(new: Path, place: Path) -> None:
    """Gives a finished file or folder its name; the system never replaces a non-empty folder."""
    os.replace(new, place)


# -- folders for a moment


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder of this process's own, which is removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="tuner-") as folder:
        yield Path(folder)


def scratch_until_exit() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tuner-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# -- caches


def is_entry(folder: Path) -> bool:
    """Whether a folder is an entry of a cache: whole, damaged or half-made."""
    is_folder = folder.is_dir() and not folder.is_symlink()
    return is_folder and (is_entry_name(folder.name) or isinstance(_json(folder / SUMS), dict))


def is_entry_name(name: str) -> bool:
    half = name.startswith(".") and name.endswith(".tmp")
    return ENTRY.fullmatch(name[1:-4] if half else name) is not None


def remove_entry(folder: Path) -> None:
    if is_entry(folder):
        shutil.rmtree(folder, ignore_errors=True)


# -- checkpoints


def remove_checkpoints(folder: Path, keep: Path | None = None) -> None:
    """Removes the checkpoints of one training except `keep`, and the folder if it is then empty."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and re.fullmatch(r"fold-\d+", path.name):
            remove_checkpoints(path, keep)
        elif path != keep:
            remove_file(path)
    remove_empty(folder)


def remove_every_checkpoint(folder: Path) -> None:
    """Removes the checkpoints of all trainings of a study, whose folder is `folder`."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            remove_checkpoints(path)
        remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Removes a folder that holds nothing."""
    with contextlib.suppress(OSError):
        folder.rmdir()


# -- exports


def files_of_export(folder: Path) -> set[str] | None:
    """The names of an export's manifest and of the files in it; None if it is no export."""
    manifest = _json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not {"tuner", "run_digest", "files"} <= manifest.keys():
        return None
    if not isinstance(manifest["files"], dict):
        return None
    return {MANIFEST, *map(os.path.normpath, manifest["files"])}


def is_whole_export(folder: Path) -> bool:
    names = files_of_export(folder)
    return names is not None and all((folder / name).is_file() for name in names)


def strangers(folder: Path) -> list[str]:
    """What is in `folder` and is not of a tuner export: everything, if it is no export."""
    names = files_of_export(folder)
    if names is None:
        return sorted(path.name for path in folder.iterdir())
    parents = {str(parent) for name in names for parent in Path(name).parents}
    unknown = []
    for place, below, files in os.walk(folder):
        inside = os.path.relpath(place, folder)
        for name in (*below, *files):
            relative = os.path.normpath(os.path.join(inside, name))
            is_folder = name in below and not os.path.islink(os.path.join(place, name))
            if relative not in (parents if is_folder else names):
                unknown.append(relative)
    return sorted(unknown)


def remove_export(folder: Path) -> None:
    """Removes an export's files, the manifest last, and the folder if it is then empty."""
    names = files_of_export(folder)
    if names is None or folder.is_symlink():
        return
    inside = {name for name in names if _is_inside(folder, name)}
    for name in sorted(inside - {MANIFEST}):
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink()
    for parent in sorted({p for name in inside for p in Path(name).parents}, reverse=True):
        remove_empty(folder / parent)


def remove_gone(folder: Path, name: str) -> None:
    """Removes a file of a kept folder that a job has removed on its own machine, or of an export
    that is being written and leaves it out.
    """
    if _is_inside(folder, name) and HALF_EXPORT.fullmatch(folder.name):
        (folder / name).unlink(missing_ok=True)
    elif _is_inside(folder, name):
        remove_file(folder / name)


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name stays below `folder`, links followed."""
    return (folder / name).parent.resolve().is_relative_to(folder.resolve())


def remove_half_export(folder: Path) -> None:
    """Removes an export that was being written, or one that another has replaced."""
    if HALF_EXPORT.fullmatch(folder.name) and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def require_target(folder: Path, instead: str) -> None:
    """Raises StorageError, saying what to do `instead`, where an export at `folder` loses data."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise StorageError(f"{folder} is no folder, and an export is one; {instead}")
    here, place = Path.cwd(), folder.resolve()
    if here.is_relative_to(place) or os.path.ismount(place):
        why = "is a mount point" if os.path.ismount(place) else "is where this command runs"
        raise StorageError(
            f"{folder} {why}: an export is put in place as a whole folder; name a folder in it, "
            f"such as {folder / 'model'}"
        )
    if not folder.is_dir() or not (others := strangers(folder)):
        return
    shown = ", ".join(limit_listing(others, 3))
    what = "an export and also" if files_of_export(folder) is not None else "no export but"
    raise StorageError(
        f"{folder} holds {what} {shown}, which tuner did not make and would have to remove; "
        f"nothing was touched: {instead}"
    )


def take_place(new: Path, folder: Path) -> Path | None:
    """Puts a finished export at `folder`; returns where the older one is now, if there was one.

    Raises StorageError where the older one was not tuner's. Where the system can exchange two
    folders, a reader always finds one of the two exports.
    """
    instead = "move these away and run the same command"
    require_target(folder, instead)
    if not folder.is_dir() or not any(folder.iterdir()):
        os.rename(new, folder)
        return None
    if exchanged(new, folder):
        if others := strangers(new):  # they came a moment ago
            exchanged(new, folder)
            raise StorageError(f"{folder} holds {others[0]}, which tuner did not make; {instead}")
        return new
    old = older(folder)
    remove_export(old)
    if os.path.lexists(old):
        raise StorageError(
            f"{old} is in the way, since the older export is kept there for a moment; {instead}"
        )
    os.rename(folder, old)
    crash_point("export.moved")
    os.rename(new, folder)
    return old


def older(folder: Path) -> Path:
    """Where an export waits while another takes its place."""
    return folder.with_name(f".{folder.name}.old")


def recover_older(folder: Path) -> None:
    """Restores an older export that a killed process moved away, unless there is a newer one."""
    old = older(folder)
    if files_of_export(old) is not None:
        if os.path.lexists(folder):
            remove_export(old)
        else:
            os.rename(old, folder)


# -- what arrives from another machine


def arriving(folder: Path, token: str) -> Path:
    """Where a folder's files wait until all have arrived; `token`: at least 8 hex digits."""
    return folder.with_name(f".{folder.name}.{token[:8]}.arriving")


def remove_arriving(folder: Path) -> None:
    """Removes what was on its way to `folder` when a process was killed."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.arriving")
    for path in folder.parent.glob(".*.arriving"):
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def clear(folder: Path) -> list[str]:
    """Removes what tuner left at `folder` for an earlier attempt; returns what else is there."""
    remove_arriving(folder)
    remove_checkpoints(folder)
    if files_of_export(folder) is not None:
        if others := strangers(folder):
            return others
        remove_export(folder)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# -- studies


def begins_with(path: Path, header: str) -> bool:
    """Whether the first line of a text file begins so."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(header)
    return False


def is_generated(path: Path) -> bool:
    """Whether tuner wrote this space.yaml or best.yaml."""
    return begins_with(path, HEADERS[path.name])


def is_own_report(path: Path) -> bool:
    """Whether tuner wrote this report, wherever it lies."""
    return begins_with(path, REPORT_HEADER)


def require_own(folder: Path) -> None:
    """Raises StorageError where a study would overwrite a YAML file that tuner did not write."""
    for name, header in HEADERS.items():
        if (folder / name).exists() and not is_generated(folder / name):
            raise StorageError(
                f"{folder / name} was not written by tuner and would be lost (tuner's begins with "
                f"{header.strip()!r}); move it away, or use another search.name or --studies"
            )


def is_study(folder: Path) -> bool:
    return is_generated(folder / "space.yaml")


def is_left(path: Path) -> bool:
    """Whether a killed process left this in a study's folder."""
    if path.name.endswith(".old"):
        return files_of_export(path) is not None
    return any(mark.fullmatch(path.name) for mark in (HALF_FILE, HALF_EXPORT, EXPORT_LOCK))


def is_of_study(path: Path) -> bool:
    """Whether tuner made this file or folder of a study's folder."""
    if path.is_symlink():
        return False
    if path.name in HEADERS:
        return is_generated(path)
    if path.name in REPORTS:
        return is_own_report(path)
    if path.suffix == ".lock" and path.name.startswith("."):
        return is_left(path) or _has_holder(path)
    if path.is_dir():
        named = path.name in ("artifacts", "checkpoints") or path.name.endswith(".checkpoints")
        return named or is_left(path) or bool(files_of_export(path)) or is_tracker_folder(path)
    marked = any(mark.fullmatch(path.name) for mark in (DATABASE, TESTED_RUN, ENQUEUED))
    return path.name == "lock" or marked or is_left(path)


def _has_holder(path: Path) -> bool:
    with contextlib.suppress(OSError):
        text = path.read_text(errors="replace")
        return bool(text) and is_holder(text)
    return False


def remove_of_study(path: Path) -> None:
    """Removes one file or folder of a study's folder: of a folder, what has tuner's marks."""
    if is_of_study(path) and not path.is_dir():
        path.unlink(missing_ok=True)
    elif not is_of_study(path):
        return
    elif HALF_EXPORT.fullmatch(path.name):
        remove_half_export(path)
    elif path.name == "artifacts":
        for artifact in [p for p in path.iterdir() if ARTIFACT.fullmatch(p.name)]:
            artifact.unlink(missing_ok=True)
        remove_empty(path)
    elif path.name == "checkpoints":
        remove_every_checkpoint(path)
    elif path.name.endswith(".checkpoints"):
        remove_checkpoints(path)
    elif is_tracker_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        remove_export(path)


def remove_study(folder: Path) -> None:
    """Removes tuner's files of a study, the marked YAML files last, and the folder if empty."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name in HEADERS):
        remove_of_study(path)
    remove_empty(folder)


def _json(path: Path) -> object:
    """A file's content; None where there is no file that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None

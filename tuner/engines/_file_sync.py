"""The files of a job on another node.

Files that the job needs are sent there. Files that must outlive the node are brought back.
"""

import concurrent.futures
import threading
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

from tuner.engines._file_chunks import folder_state, list_names, read_chunks, write_chunk
from tuner.engines._ray_cluster import Node
from tuner.errors import StorageError
from tuner.files import removal
from tuner.files.atomic import disk_errors
from tuner.jobs import Job

ANSWER = 600.0  # seconds in which a worker takes one chunk of files


class FileSync:
    """Sends and receives the files of jobs, in threads, so that other workers are served meanwhile.

    `ship`: folders that a node lacks are sent to it, once for each node.
    """

    def __init__(self, ray: Any, ship: bool) -> None:
        self.ray, self.may_ship = ray, ship
        self.threads = concurrent.futures.ThreadPoolExecutor(8, "tuner-file-sync")
        self.locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self.token = uuid.uuid4().hex
        self.known_present: set[tuple[str, str]] = set()  # (node, folder): it is there
        self.shared_folders: dict[tuple[str, Path], bool] = {}  # (node, folder): its files are ours

    def prepare(
        self, actor: Any, node: Node, job: Job
    ) -> "concurrent.futures.Future[list[str]] | None":
        """Begin what must be done before a job starts. None: nothing.

        The result: the folders of `job.folders_to_keep` whose changes must be brought back.
        """
        folders = [
            f
            for f in job.folders_needed
            if self.may_ship and (node.id, f) not in self.known_present
        ]
        if not folders and not job.folders_to_keep:
            return None
        return self.threads.submit(self.prepare_worker, actor, node, folders, job.folders_to_keep)

    def prepare_worker(
        self, actor: Any, node: Node, folders: list[str], folders_to_keep: tuple[str, ...]
    ) -> list[str]:
        with self.locks[node.id]:
            for path in self.get(actor.missing_paths.remote(folders)) if folders else ():
                self.send_path(actor, Path(path))
            self.known_present.update((node.id, f) for f in folders)
            apart = [
                folder
                for folder in folders_to_keep
                if not self.is_shared(actor, node, Path(folder).parent)
            ]
        for folder in apart:
            removal.remove_arriving(Path(folder))
            # what an earlier attempt left there is older than what came back
            others = self.get(actor.clear_folder.remote(folder))
            if others:
                raise StorageError(
                    f"{folder} on node {node.name} holds {others[0]}, which tuner did not make and "
                    "would have to remove; move it away there, or write to another folder "
                    "(--studies, --out)"
                )
            self.send_all(actor, Path(folder), list(folder_state(Path(folder))))
        return apart

    def get(self, reference: Any) -> Any:
        """Return a worker's answer. The wait has a limit, because the worker may be stopped."""
        return self.ray.get(reference, timeout=ANSWER)

    def send_path(self, actor: Any, path: Path) -> None:
        """Send a file or a folder to the same path, where it appears whole or not at all.

        Only one chunk at a time is in the object store.
        """
        if path.is_file():
            for chunk in read_chunks(path.parent, [path.name]):
                self.get(actor.receive_chunk.remote(str(path.parent), chunk))
            return
        self.send_all(actor, path, list(list_names(path)))

    def send_all(self, actor: Any, folder: Path, wanted: list[str]) -> None:
        """Send files of a folder, which appears when all of them have arrived."""
        arriving = str(removal.arriving(folder, uuid.uuid4().hex))
        for chunk in read_chunks(folder, wanted):
            self.get(actor.receive_chunk.remote(arriving, chunk))
        if wanted:
            self.get(actor.rename_arrived.remote(arriving, str(folder)))

    def is_shared(self, actor: Any, node: Node, folder: Path) -> bool:
        """Return whether a node sees this folder's files, and not others at the same path."""
        if (node.id, folder) not in self.shared_folders:
            marker = folder / f".{uuid.uuid4().hex}.tmp"
            with disk_errors(marker):
                folder.mkdir(parents=True, exist_ok=True)
                marker.touch()
            try:
                self.shared_folders[node.id, folder] = not self.get(
                    actor.missing_paths.remote([str(marker)])
                )
            finally:
                removal.remove_file(marker)
        return self.shared_folders[node.id, folder]

    def receive_changes(self, job: Job, kind: str, folder: Path, value: Any) -> None:
        """Take over what changed in a kept folder on a job's node.

        `value`: pieces of files or, where `kind` is "gone", the names of removed files. An export
        replaces an older one when all its files are here. Raises StorageError.
        """
        if job.whole != str(folder):
            if kind == "kept":
                write_chunk(folder, value)
            else:
                for name in value:
                    removal.remove_gone(folder, name)
        elif kind == "kept":
            new = removal.arriving(folder, self.token)
            write_chunk(new, value)
            if removal.is_whole_export(new):
                with disk_errors(folder):
                    old = removal.take_place(new, folder)
                    if old is not None:
                        removal.remove_export(old)

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)

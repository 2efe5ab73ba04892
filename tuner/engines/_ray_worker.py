"""The worker's side of the Ray engine: an actor that carries out jobs and streams their reports."""

import concurrent.futures
import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import tuner
from tuner.engines import _process_settings
from tuner.engines._file_chunks import (
    FilePiece,
    FolderState,
    folder_state,
    read_chunks,
    write_chunk,
)
from tuner.engines._job_runner import run_job
from tuner.files import removal
from tuner.files.atomic import disk_errors
from tuner.jobs import Job, Outcome

ANSWER_TIMEOUT = (
    30.0  # seconds without an answer after which a job goes on as if it had been told to
)
STOP_SECONDS = 3.0  # seconds in which a job that is ended can remove its temporary files

Message = tuple[str, str, Any]
"""Its kind (alive, kept, gone, report or ended), the token of the job it is of, the value."""


class RayWorker:
    """An actor: a process that Ray creates where one trial has room, and that ends with the driver.

    `folder` and `path` are the driver's working directory and sys.path, so that relative names mean
    the same here.
    """

    def __init__(self, folder: str, path: list[str], cpus: int, gpus: float) -> None:
        _process_settings.keep_freed_memory()
        _process_settings.use_expandable_segments()
        _process_settings.set_thread_wait_policy()
        if gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides only what it hands out
        sys.path += [place for place in path if place not in sys.path]
        with contextlib.suppress(OSError):  # a relative path is then missed by name
            os.makedirs(folder, exist_ok=True)
            os.chdir(folder)
        self.cpus, self.gpus = cpus, gpus
        self.thread = concurrent.futures.ThreadPoolExecutor(
            1
        )  # one for all jobs: OpenMP keeps a team per thread
        self.condition = threading.Condition()
        self.token, self.report_count, self.answer_count, self.should_continue = "", 0, 0, True
        self.job_thread: int | None = None  # the job's thread

    def report_version(self) -> str:
        return tuner.__version__

    def missing_paths(self, paths: list[str]) -> list[str]:
        return [path for path in paths if not os.path.exists(path)]

    def receive_chunk(self, folder: str, parcel: list[FilePiece]) -> None:
        write_chunk(Path(folder), parcel)

    def clear_folder(self, folder: str) -> list[str]:
        """Remove what an earlier attempt left in a kept folder. Return what else stays in it."""
        with disk_errors(Path(folder)):
            return removal.clear(Path(folder))

    def rename_arrived(self, arrived: str, folder: str) -> None:
        """A folder that has arrived whole gets its name."""
        with contextlib.suppress(OSError):  # it is there by now
            removal.put(Path(arrived), Path(folder))

    # -- a job

    def run_job(
        self, job: Job, token: str, folders_to_sync: list[str], heartbeat: float
    ) -> Iterator[Message]:
        """Carry out a job in another thread. Changes in `folders_to_sync` are sent along.

        After the first message there is a sign of life after each `heartbeat` seconds without
        another message.
        """
        with self.condition:
            self.token, self.report_count, self.answer_count, self.should_continue = (
                token,
                0,
                0,
                True,
            )
        said: SimpleQueue[Message] = SimpleQueue()
        kept = [WatchedFolder(folder, said, token) for folder in folders_to_sync]
        self.thread.submit(self.execute, job, token, said, kept)
        message, timeout = ("", "", None), None
        while message[0] != "ended":
            try:
                message = said.get(timeout=timeout)
            except Empty:
                message = ("alive", token, None)
            yield message
            timeout = heartbeat

    def execute(
        self,
        job: Job,
        token: str,
        messages: "SimpleQueue[Message]",
        watched_folders: "list[WatchedFolder]",
    ) -> None:
        def report(value: Any) -> bool:
            behind = self.answer_count < self.report_count
            for folder in (
                watched_folders if not behind else ()
            ):  # else nobody takes files now; the newest go when someone does
                folder.send_changes()
            messages.put(("report", token, value))
            return self.wait_for_answer(behind)

        self.job_thread = threading.get_ident()
        try:
            # This loads torch. Meanwhile no other thread of this process may run for minutes.
            self.limit_resources()
            messages.put(("alive", token, None))
            outcome = run_job(job, report, 0)  # Ray shows a worker only its own GPU
            for folder in watched_folders:
                folder.send_changes()
        except Exception as error:
            outcome = Outcome("failed", reason=f"{type(error).__name__}: {error}"[:300])
        finally:
            self.job_thread = None
        messages.put(("ended", token, outcome))

    def limit_resources(self) -> None:
        """Give this worker its part of the cores and of its GPU."""
        import torch  # here: the coordinator imports this module too, and stays without torch

        torch.set_num_threads(self.cpus)
        if 0 < self.gpus < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(self.gpus)

    def wait_for_answer(self, is_behind: bool) -> bool:
        """Return whether to go on.

        A coordinator that was silent for ANSWER_TIMEOUT is not waited for until it has caught up.
        """
        with self.condition:
            self.report_count += 1
            self.condition.wait_for(
                lambda: self.answer_count >= self.report_count or not self.should_continue,
                0 if is_behind else ANSWER_TIMEOUT,
            )
            return self.should_continue

    def receive_answer(self, token: str, should_continue: bool) -> None:
        with self.condition:
            if token == self.token:  # else to a job that is gone
                self.answer_count += 1
                self.should_continue = self.should_continue and should_continue
                self.condition.notify_all()

    def stop(self) -> None:
        """Unwind the running job, so that its temporary files are removed.

        The caller ends the process afterwards.
        """
        if self.job_thread is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.job_thread), ctypes.py_object(SystemExit)
            )
        with self.condition:
            self.token, self.should_continue = "", False
            self.condition.notify_all()
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.thread.submit(lambda: None).result(
                STOP_SECONDS
            )  # its turn comes when the job is gone


class WatchedFolder:
    """A folder whose files must outlive this node: what has changed since it was last sent."""

    def __init__(self, folder: str, messages: "SimpleQueue[Message]", token: str) -> None:
        self.folder, self.messages, self.token = Path(folder), messages, token
        self.sent_state: FolderState = folder_state(self.folder)

    def send_changes(self) -> None:
        now = folder_state(self.folder)
        for parcel in read_chunks(
            self.folder, [name for name, state in now.items() if self.sent_state.get(name) != state]
        ):
            self.messages.put(("kept", self.token, (self.folder, parcel)))
        if gone := self.sent_state.keys() - now.keys():
            self.messages.put(("gone", self.token, (self.folder, sorted(gone))))
        self.sent_state = now

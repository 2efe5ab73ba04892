"""The worker's side of the Ray engine: an actor that carries jobs out, one after another, and streams what they report."""

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
from tuner.engines._file_chunks import Piece, Seen, parcels, seen, unpack
from tuner.engines._job_runner import carry_out
from tuner.files import removal
from tuner.files.atomic import disk_errors
from tuner.jobs import Job, Outcome

PATIENCE = 30.0  # seconds without an answer after which a job goes on as if it had been told to
FAREWELL = 3.0  # seconds in which a job that is ended can remove its temporary files

Message = tuple[str, str, Any]
"""Its kind (alive, kept, gone, report or ended), the token of the job it is of, the value."""


class Slot:
    """Created by Ray where there is room for one trial. It is one process, and ends with the driver.

    `folder` and `path` are the driver's working directory and sys.path, so that relative names mean the same here.
    """

    def __init__(self, folder: str, path: list[str], cpus: int, gpus: float) -> None:
        _process_settings.keep_memory()
        _process_settings.quiet_threads()
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
        self.heard = threading.Condition()
        self.token, self.reports, self.answers, self.go_on = "", 0, 0, True
        self.running: int | None = None  # the job's thread

    def greet(self) -> str:
        return tuner.__version__

    def missing(self, paths: list[str]) -> list[str]:
        return [path for path in paths if not os.path.exists(path)]

    def take(self, folder: str, parcel: list[Piece]) -> None:
        unpack(Path(folder), parcel)

    def clear(self, folder: str) -> list[str]:
        """Removes what an earlier attempt left at a kept folder; returns what else is there, which stays."""
        with disk_errors(Path(folder)):
            return removal.clear(Path(folder))

    def settle(self, arrived: str, folder: str) -> None:
        """A folder that has arrived whole gets its name."""
        with contextlib.suppress(OSError):  # it is there by now
            removal.put(Path(arrived), Path(folder))

    # -- a job

    def carry(
        self, job: Job, token: str, keeping: list[str], heartbeat: float
    ) -> Iterator[Message]:
        """Carries out a job in a thread beside this one. What changes in the folders `keeping` is sent along.

        From its first message on there is a sign of life after each `heartbeat` seconds without another message.
        """
        with self.heard:
            self.token, self.reports, self.answers, self.go_on = token, 0, 0, True
        said: SimpleQueue[Message] = SimpleQueue()
        kept = [Kept(folder, said, token) for folder in keeping]
        self.thread.submit(self.work, job, token, said, kept)
        message, timeout = ("", "", None), None
        while message[0] != "ended":
            try:
                message = said.get(timeout=timeout)
            except Empty:
                message = ("alive", token, None)
            yield message
            timeout = heartbeat

    def work(self, job: Job, token: str, said: "SimpleQueue[Message]", kept: "list[Kept]") -> None:
        def report(value: Any) -> bool:
            behind = self.answers < self.reports
            for folder in (
                kept if not behind else ()
            ):  # else nobody takes files now; the newest go when someone does
                folder.send()
            said.put(("report", token, value))
            return self.answered(behind)

        self.running = threading.get_ident()
        try:
            self.share()  # reads torch, while which no other thread of this process may run for minutes
            said.put(("alive", token, None))
            outcome = carry_out(job, report, 0)  # Ray shows a slot only its own GPU
            for folder in kept:
                folder.send()
        except Exception as error:
            outcome = Outcome("failed", reason=f"{type(error).__name__}: {error}"[:300])
        finally:
            self.running = None
        said.put(("ended", token, outcome))

    def share(self) -> None:
        """A slot's part of the cores and of its GPU."""
        import torch  # here: the coordinator imports this module too, and stays without torch

        torch.set_num_threads(self.cpus)
        if 0 < self.gpus < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(self.gpus)

    def answered(self, behind: bool) -> bool:
        """Whether to go on. A coordinator that was silent for PATIENCE is not waited for again before it has caught up."""
        with self.heard:
            self.reports += 1
            self.heard.wait_for(
                lambda: self.answers >= self.reports or not self.go_on, 0 if behind else PATIENCE
            )
            return self.go_on

    def answer(self, token: str, go_on: bool) -> None:
        with self.heard:
            if token == self.token:  # else to a job that is gone
                self.answers += 1
                self.go_on = self.go_on and go_on
                self.heard.notify_all()

    def end(self) -> None:
        """Unwinds the running job, so that its temporary files go; whoever calls ends the process afterwards."""
        if self.running is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.running), ctypes.py_object(SystemExit)
            )
        with self.heard:
            self.token, self.go_on = "", False
            self.heard.notify_all()
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.thread.submit(lambda: None).result(FAREWELL)  # its turn comes when the job is gone


class Kept:
    """A folder whose files must outlive this node: what has changed since it was last sent."""

    def __init__(self, folder: str, said: "SimpleQueue[Message]", token: str) -> None:
        self.folder, self.said, self.token = Path(folder), said, token
        self.sent: Seen = seen(self.folder)

    def send(self) -> None:
        now = seen(self.folder)
        for parcel in parcels(
            self.folder, [name for name, state in now.items() if self.sent.get(name) != state]
        ):
            self.said.put(("kept", self.token, (self.folder, parcel)))
        if gone := self.sent.keys() - now.keys():
            self.said.put(("gone", self.token, (self.folder, sorted(gone))))
        self.sent = now

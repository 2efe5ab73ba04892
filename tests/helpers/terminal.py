"""A command in a real terminal: a pseudo-terminal of which it is the foreground process, whose size can change and whose keys can be pressed."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
ROWS = 30
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """Starts the command. `text` is all that it has written so far, with escape sequences.

    A change of size is a SIGWINCH for the command, and Ctrl-C a SIGINT for all of its processes.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: Path,
        columns: int,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.leader, self.follower = pty.openpty()
        self.resize(columns)
        unset = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-Sc", TAKE_TERMINAL, *command],
            stdin=self.follower,
            stdout=self.follower,
            stderr=self.follower,
            cwd=folder,
            env={**unset, "TERM": "xterm", **(environ or {})},
            start_new_session=True,
        )
        self.text, self.found = "", 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.follower)
        os.close(self.leader)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.leader, keys.encode())

    def read_until(self, pattern: str, seconds: float = 120) -> int:
        """Waits until the pattern has been written after what an earlier call found; gives where the
        text goes on after it."""
        deadline = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.text, self.found)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} was not written:\n{self.text}"
            assert self._read() or self.process.poll() is None, self.text
        self.found = found.end()
        return self.found

    def wait(self, seconds: float = 120) -> int:
        """Reads to the end of the command, and gives its exit status."""
        deadline = time.monotonic() + seconds
        while self._read() or self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
        return self.process.returncode

    def _read(self) -> bool:
        """Reads what is there; whether there was anything."""
        if not select.select([self.leader], [], [], 0.1)[0]:
            return False
        self.text += os.read(self.leader, 65536).decode(errors="replace")
        return True


def rows_of(text: str) -> list[str]:
    """Each row that was written, without escape sequences; a row that was drawn twice is there twice."""
    return [row.rstrip() for row in ESCAPES.sub("", text).replace("\r", "\n").split("\n")]

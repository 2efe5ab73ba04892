"""The dashboard process of `tuner run --dashboard`.

Waits for the study to be made, serves it, ends with the search.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna

from tuner.config import database_url
from tuner.dashboard import server
from tuner.errors import TunerError
from tuner.search import storage

TOKEN = "TUNER_DASHBOARD_TOKEN"  # in the environment: other users see a command line, and not that


def start_process(
    name: str, studies: Path, port: int, url: str, token: str
) -> "subprocess.Popen[bytes]":
    """The process, which Ctrl-C does not reach: that is the search's.

    `url` is the database's as it is written.
    """
    password = database_url.literal_password(
        url
    )  # it is in no file that the process reads, and not on its command line
    known = os.environ | {TOKEN: token} | ({"PGPASSWORD": password} if password else {})
    # -P: without it Python would import from the current folder, where anything may lie
    command = [
        sys.executable,
        "-P",
        "-m",
        "tuner.dashboard.background",
        name,
        str(studies),
        str(port),
    ]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=known)


def main(name: str, studies: str, port: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    folder = Path(studies) / name
    while not (folder / "space.yaml").is_file():
        time.sleep(0.2)
    try:
        token = os.environ.pop(TOKEN, None)
        place = storage.stated(folder)
        server.serve(
            folder, place, int(port), allow_writes=False, announce=lambda _: None, token=token
        )
    except TunerError as error:
        print(f"tuner: warning: dashboard: {error}", file=sys.stderr)


def _exit_with_parent() -> None:
    """The parent holds the other end of stdin and never writes.

    The kernel closes it however the parent ends.
    """
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

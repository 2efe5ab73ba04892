"""The dashboard process of `tuner run --dashboard`: waits for the study to be made, serves it, ends with the search."""

import os
import sys
import threading
import time
from pathlib import Path

import optuna

from tuner import dashboard, parsing
from tuner.errors import TunerError


def main(name: str, studies: str, port: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(studies) / name
    while not (folder / "space.yaml").is_file():
        time.sleep(0.2)
    try:
        url = parsing.load(folder / "space.yaml").settings.storage
        dashboard.serve(folder, url, int(port), write=False, announce=lambda _: None)
    except TunerError as error:
        print(f"tuner: warning: dashboard: {error}", file=sys.stderr)


def _end_with_parent() -> None:
    """The parent holds the other end of stdin and never writes; the kernel closes it however the parent ends."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Commands and works in processes of their own, forked from one that has imported everything: a run without its seconds of start-up."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# what a command and its trials would import
LOADED = (
    "alembic.command",
    "sqlalchemy.dialects.sqlite",
    "tuner.cli",
    "tuner.commands.run",
    "tuner.config.parsing",
    "tuner.data.synthetic",
    "tuner.engines.inline",
    "tuner.export.safetensors",
    "tuner.models.resnet",
    "tuner.tasks.classification",
    "tuner.training.finalization",
    "tuner.training.training_loop",
    "tuner.training.worker_jobs",
)


class ForkServer:
    def __init__(self) -> None:
        quiet = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }  # no thread is there to be lost by a fork
        command = [sys.executable, "-m", "tests.helpers.forked_commands"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **quiet},
            cwd=Path(__file__).parents[2],
        )

    def tuner(self, folder: Path, *words: object, **environment: str) -> tuple[int, str]:
        """The command line in `folder`: exit code, and all that it said."""
        return self._ask(folder, environment, {"words": [*map(str, words)]})

    def call_function(
        self, folder: Path, name: str, *arguments: Any, **environment: str
    ) -> tuple[int, str]:
        """module:function(*arguments) in `folder`; what it returns is the last line said, as JSON."""
        return self._ask(folder, environment, {"work": name, "arguments": [*arguments]})

    def _ask(
        self, folder: Path, environment: dict[str, str], what: dict[str, Any]
    ) -> tuple[int, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        (folder / "said").unlink(missing_ok=True)
        environment = {"TUNER_HOME": str(folder / "home"), "TUNER_CRASH_AT": "", **environment}
        self.process.stdin.write(
            json.dumps({"folder": str(folder), "environment": environment, **what}) + "\n"
        )
        self.process.stdin.flush()
        code = json.loads(self.process.stdout.readline())
        return os.waitstatus_to_exitcode(code), (folder / "said").read_text()


@contextlib.contextmanager
def forks() -> Iterator[ForkServer]:
    found = ForkServer()
    try:
        yield found
    finally:
        found.process.communicate(timeout=60)  # it ends with its input


def child(asked: dict[str, Any]) -> int:
    os.chdir(asked["folder"])
    os.environ.update(asked["environment"])
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.path.insert(0, asked["folder"])
    try:
        if "words" in asked:
            from tuner.cli import main

            sys.argv = ["tuner", *asked["words"]]
            main()
        module, _, function = asked["work"].partition(":")
        print(json.dumps(getattr(importlib.import_module(module), function)(*asked["arguments"])))
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(child(json.loads(line)))
        answers.write(f"{os.waitpid(pid, 0)[1]}\n")
        answers.flush()


if __name__ == "__main__":
    for needed in LOADED:
        importlib.import_module(needed)
    from tuner.search import optuna_internals

    optuna_internals.missing()  # each process would try Optuna's inner names anew
    serve()

"""One rank of a training on several GPUs: the process that `rank_launcher` starts."""

import contextlib
import copy
import os
import sys
import traceback
from multiprocessing.connection import Client, Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from tuner.engines import _process_settings


def main(folder: Path) -> None:
    """Takes a job from the worker and carries it out as the rank that the environment names.

    What happened goes back to the worker: `report` after each epoch of rank 0, then `done`,
    `failed` or `memory`. An exit code other than 0 makes the worker end the other ranks.
    """
    _process_settings.die_with_parent()
    _process_settings.keep_freed_memory()
    _process_settings.use_expandable_segments()
    # after the settings: it loads torch
    from tuner.training.rank_launcher import LINK_NAME, MEETING_NAME

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with Client(str(folder / LINK_NAME), family="AF_UNIX") as link:
        job = link.recv()
        kind, value = carry_out(job, link, rank, count, folder / MEETING_NAME)
        if kind != "done" or rank == 0:
            link.send((kind, value, rank))
    if kind != "done":
        # at once: a collective that waits for the other ranks would hold up an orderly end
        os._exit(1)


def carry_out(job: Any, link: Connection, rank: int, count: int, meeting: Path) -> tuple[str, Any]:
    """Calls the job's function and says how it ended, in the words of `rank_launcher.Ending`."""
    import importlib

    from tuner.training.data_parallel import Dismissed, join_ranks, leave_ranks
    from tuner.training.micro_batches import is_out_of_memory

    def report(value: Any) -> bool:
        if rank > 0:
            return True  # rank 0 says when the training ends
        link.send(("report", value, rank))
        return bool(link.recv())

    module, _, function = job.function.partition(":")
    try:
        join_ranks(rank, count, meeting)
        value = getattr(importlib.import_module(module), function)(job.argument, report, job.slot)
        leave_ranks()
        return "done", value
    except Dismissed:
        leave_ranks()
        return "done", None
    except Exception as error:  # whatever it is, the worker must hear of it
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return "memory", str(error).splitlines()[0]
        return "failed", portable(error)


def portable(error: Exception) -> Exception:
    """The error with its traceback as a note, in a form that can be sent to another process."""
    trace = traceback.format_exc()
    with contextlib.suppress(Exception):
        error.add_note(trace)
        ForkingPickler.dumps(error)
        copy.deepcopy(error)  # makes it anew, as the worker does when it unpickles it
        return error
    described = RuntimeError(f"{type(error).__name__}: {error}")
    described.add_note(trace)
    return described


if __name__ == "__main__":
    main(Path(sys.argv[1]))

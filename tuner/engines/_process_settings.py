"""What a process asks of the machine before torch is loaded: memory that stays, threads that wait as the load allows, an end."""

import contextlib
import ctypes
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SAMPLES, SAMPLE_SECONDS = 10, 0.01  # seconds
PR_SET_PDEATHSIG = 1  # prctl.h of Linux
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
SAFE_PATH, OURS = "PYTHONSAFEPATH", "tuner"  # Python's own variable, which may have any value
TRIM_THRESHOLD_BYTES, TOP_PAD_BYTES = 2**31 - 1, 64 * 2**20  # bytes


def keep_freed_memory() -> bool:
    """Has glibc's malloc keep what is freed, for the next tensor of that size. False where there is no such malloc.

    It otherwise maps every large tensor from the kernel and gives it back after use, so that each operator of a training
    step pays for new, zeroed pages: on a CPU up to half of a step's time. The price is a process that does not shrink.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return False
    return all(
        [
            mallopt(M_MMAP_MAX, 0),
            mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
            mallopt(M_TOP_PAD, TOP_PAD_BYTES),
        ]
    )


def die_with_parent() -> bool:
    """Has the kernel kill this process when the thread that started it ends, however it ends. False where no kernel does.

    A stopped process cannot see to that itself: it would outlive a killed parent for ever.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError, TypeError):  # no Linux
        return False
    return bool(prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL)) == 0)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """A Python that is started in this block does not import from the current folder, where anything may lie.

    multiprocessing gives it this process's `sys.path` a little later, with the folder in it where the user's own module
    needs it.
    """
    if os.environ.get(SAFE_PATH):  # the user wants it for everything
        yield
        return
    os.environ[SAFE_PATH] = OURS
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]


def forget_safe_path() -> None:
    """Programs that the user's own code starts in this process import as if they were started by hand."""
    if os.environ.get(SAFE_PATH) == OURS:
        del os.environ[SAFE_PATH]


def cores(root: Path = Path("/")) -> float:
    """How many cores this process may use at a time: those that it may run on, or its quota where that is less."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    there = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(float(there), quota(root))


def quota(root: Path = Path("/")) -> float:
    """The CPU time that this process's control groups allow, in cores; infinite where nothing limits it.

    A container with a quota of 4 cores sees all 64 of its machine. With 64 threads it uses its quota up in a moment, and
    is stopped for the rest of each period. `root` holds /proc and /sys.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return math.inf
    limits = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers  # version 2 has no controllers in its line
        folder = top / path.strip("/")  # of this group; in a container it may be seen as `top`
        for group in (folder, *folder.parents):
            limits.append(_limit(group))
            if group == top:
                break
    return min(limits)


def _limit(group: Path) -> float:
    """A control group's quota in cores."""
    try:
        if (group / "cpu.max").is_file():
            allowed, period = (group / "cpu.max").read_text().split()
        else:
            allowed = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return float(allowed) / float(period) if float(allowed) > 0 else math.inf
    except (OSError, ValueError):  # no such file, or `max`
        return math.inf


def set_thread_wait_policy() -> None:
    """Has OpenMP's idle threads sleep when others want the cores; where nobody does, they spin, as is libgomp's way.

    Spinning threads meet sooner (a small model's step takes a third of the time), but on a crowded machine they keep the
    working ones from running (fifty times as long). OMP_WAIT_POLICY or GOMP_SPINCOUNT in the environment decide instead.
    """
    if (
        "OMP_WAIT_POLICY" not in os.environ
        and "GOMP_SPINCOUNT" not in os.environ
        and is_machine_busy()
    ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def is_machine_busy() -> bool:
    """Whether, at most looks of a tenth of a second, a process beside this one was running. True where it cannot be seen."""
    busy = 0
    for _ in range(SAMPLES):
        try:
            text = Path("/proc/stat").read_text()
        except OSError:
            return True
        running = next(
            (
                int(line.split()[1])
                for line in text.splitlines()
                if line.startswith("procs_running")
            ),
            2,
        )
        busy += running > 1  # one is who is looking
        time.sleep(SAMPLE_SECONDS)
    return 2 * busy > SAMPLES

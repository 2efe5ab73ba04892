"""Settings of a process that must be made before torch is loaded.

They concern freed memory, waiting threads, the end of the process, and its share of the cores.
"""

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

SAMPLES, SAMPLE_SECONDS = 10, 0.01  # seconds
PR_SET_PDEATHSIG = 1  # prctl.h of Linux
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
SAFE_PATH, OURS = "PYTHONSAFEPATH", "tuner"  # Python's own variable, which may have any value
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's; the old name last
TRIM_THRESHOLD_BYTES, TOP_PAD_BYTES = 2**31 - 1, 64 * 2**20  # bytes


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory for the next tensor of that size.

    Otherwise malloc maps every large tensor from the kernel and gives it back after use. So each
    operator of a training step pays for new, zeroed pages: on a CPU up to half of a step's time.
    The price is a process that does not shrink. Returns False where there is no such malloc.
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
    """Make the kernel kill this process when the thread that started it ends, however it ends.

    A stopped process cannot do this itself: it would always outlive a killed parent. Returns False
    where the kernel cannot do it.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError, TypeError):  # no Linux
        return False
    return bool(prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL)) == 0)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Keep a Python that is started in this block from importing from the current folder.

    Any file may lie there. A little later multiprocessing gives the new process this process's
    `sys.path`, with the folder in it where the user's own module needs it.
    """
    if os.environ.get(SAFE_PATH):  # the user wants it for everything
        yield
        return
    os.environ[SAFE_PATH] = OURS
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Keep a Python that multiprocessing starts in this block from running the main script again.

    What it carries out is named by modules of their own. A user's script that calls `tuner.run` at
    its top would otherwise start itself in each worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def forget_safe_path() -> None:
    """Undo `safe_path` for programs that the user's own code starts in this process."""
    if os.environ.get(SAFE_PATH) == OURS:
        del os.environ[SAFE_PATH]


def use_expandable_segments() -> None:
    """Make torch's allocator of GPU memory enlarge what it has instead of asking for new pieces.

    Batches of changing sizes then leave no holes that nothing fits into. PYTORCH_ALLOC_CONF or
    PYTORCH_CUDA_ALLOC_CONF in the environment decide instead, where they are set.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def cores(root: Path = Path("/")) -> float:
    """Return how many cores this process may use.

    That is its affinity, its quota or OMP_NUM_THREADS, whichever is least.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    there = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(float(there), quota(root), stated_threads())


def stated_threads() -> float:
    """Return the number of threads that the environment states; infinite: none.

    OpenMP takes a list, such as `4,2`: the first number is that of the outermost level.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return float(first) if first.isdecimal() and int(first) > 0 else math.inf


def quota(root: Path = Path("/")) -> float:
    """Return the CPU time that this process's control groups allow, in cores; infinite: no limit.

    A container with a quota of 4 cores sees all 64 of its machine. With 64 threads it uses up its
    quota in a moment, and is stopped for the rest of each period. `root` has /proc and /sys.
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
    """Make OpenMP's idle threads sleep on a busy machine. On an idle one they spin, as by default.

    Spinning threads meet sooner: a small model's step takes a third of the time. On a crowded
    machine they keep the working threads from running: fifty times as long. OMP_WAIT_POLICY or
    GOMP_SPINCOUNT in the environment decide instead, where they are set.
    """
    if (
        "OMP_WAIT_POLICY" not in os.environ
        and "GOMP_SPINCOUNT" not in os.environ
        and is_machine_busy()
    ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def is_machine_busy() -> bool:
    """Return whether other processes ran at most of ten looks within a tenth of a second.

    True where it cannot be seen.
    """
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
        busy += running > 1  # one is this process itself
        time.sleep(SAMPLE_SECONDS)
    return 2 * busy > SAMPLES

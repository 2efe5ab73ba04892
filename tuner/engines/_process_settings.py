"""What a process asks of the machine before torch is loaded: memory that stays, threads that wait as the load allows, an end."""

import ctypes
import os
import signal
import time
from pathlib import Path

LOOKS, BETWEEN = 10, 0.01  # seconds
PR_SET_PDEATHSIG = 1  # prctl.h of Linux
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
KEEP, PAD = 2**31 - 1, 64 * 2**20  # bytes


def keep_memory() -> bool:
    """Has glibc's malloc keep what is freed, for the next tensor of that size. False where there is no such malloc.

    It otherwise maps every large tensor from the kernel and gives it back after use, so that each operator of a training
    step pays for new, zeroed pages: on a CPU up to half of a step's time. The price is a process that does not shrink.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, KEEP), mallopt(M_TOP_PAD, PAD)])


def end_with_parent() -> bool:
    """Has the kernel kill this process when the thread that started it ends, however it ends. False where no kernel does.

    A stopped process cannot see to that itself: it would outlive a killed parent for ever.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError, TypeError):  # no Linux
        return False
    return bool(prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL)) == 0)


def quiet_threads() -> None:
    """Has OpenMP's idle threads sleep when others want the cores; where nobody does, they spin, as is libgomp's way.

    Spinning threads meet sooner (a small model's step takes a third of the time), but on a crowded machine they keep the
    working ones from running (fifty times as long). OMP_WAIT_POLICY or GOMP_SPINCOUNT in the environment decide instead.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ and crowded():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def crowded() -> bool:
    """Whether, at most looks of a tenth of a second, a process beside this one was running. True where it cannot be seen."""
    busy = 0
    for _ in range(LOOKS):
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
        time.sleep(BETWEEN)
    return 2 * busy > LOOKS

"""What a worker asks of the machine: memory that is kept, threads that sleep only where others want the cores."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.engines import _process_settings

FAULTS = """
import resource, sys
from tuner.engines import _process_settings as machine
print(machine.keep_memory() if sys.argv[1] == "keep" else None)
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(10):
        x = torch.ones(12_000_000) + 1  # 48 MB each, made and freed
        del x
work()
before = faults()
work()
print(faults() - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so eagerly"
)
def test_memory_that_is_kept_costs_no_new_pages() -> None:
    faults = {}
    for word in ("keep", "plain"):
        said = subprocess.run(
            [sys.executable, "-c", FAULTS, word], capture_output=True, text=True, check=True
        ).stdout.split()
        faults[word] = int(said[1])
        assert said[0] == ("True" if word == "keep" else "None")
    assert faults["keep"] < faults["plain"] / 10


def running(processes: int) -> Callable[..., str]:
    real = Path.read_text

    def read(self: Path, *rest: str) -> str:
        return (
            f"cpu 1\nprocs_running {processes}\nprocs_blocked 0\n"
            if str(self) == "/proc/stat"
            else real(self, *rest)
        )

    return read


@pytest.mark.parametrize(("processes", "asleep"), [(1, False), (2, True), (9, True)])
def test_idle_threads_sleep_where_others_run(
    processes: int, asleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(Path, "read_text", running(processes))
    start = time.monotonic()
    _process_settings.quiet_threads()
    assert (
        _process_settings.os.environ.get("OMP_WAIT_POLICY") == "PASSIVE"
    ) == asleep and time.monotonic() - start < 2
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "100")]
)
def test_what_the_environment_says_stays(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "read_text", running(9))
    _process_settings.quiet_threads()
    assert _process_settings.os.environ.get("OMP_WAIT_POLICY") == (
        value if name == "OMP_WAIT_POLICY" else None
    )

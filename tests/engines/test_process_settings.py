"""What a worker asks of the machine: memory that is kept, threads that sleep only where others want the cores."""

import math
import os
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
print(machine.keep_freed_memory() if sys.argv[1] == "keep" else None)
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


@pytest.mark.slow
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
    _process_settings.set_thread_wait_policy()
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
    _process_settings.set_thread_wait_policy()
    assert _process_settings.os.environ.get("OMP_WAIT_POLICY") == (
        value if name == "OMP_WAIT_POLICY" else None
    )


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),  # version 2, as seen in a container
        ("0::/pod/main\n", {"pod/cpu.max": "50000 100000", "pod/main/cpu.max": "max 100000"}, 0.5),
        ("0::/elsewhere\n", {"cpu.max": "max 100000"}, math.inf),
        (
            "5:memory:/a\n4:cpu,cpuacct:/docker/1\n3:cpuset:/\n",  # version 1, the host's path
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "50000"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("0::/\n", {"cpu.max": "nonsense"}, math.inf),
        (None, {}, math.inf),  # no Linux
    ],
)
def test_a_containers_quota_limits_the_cores(
    groups: str | None,
    files: dict[str, str],
    expected: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _process_settings.quota(tmp_path) == expected
    assert _process_settings.cores(tmp_path) == min(len(os.sched_getaffinity(0)), expected)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [("1", 1), (" 1 ", 1), ("1,4", 1), ("", None), ("0", None), ("many", None), ("9999", None)],
)
def test_the_users_number_of_threads_is_kept(
    stated: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    assert _process_settings.cores(tmp_path) == (expected or len(os.sched_getaffinity(0)))


def test_gpu_memory_grows_in_place_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in _process_settings.ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    _process_settings.use_expandable_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    _process_settings.use_expandable_segments()
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"

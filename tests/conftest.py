"""What several test files need: a home of their own, small real spaces, and the command line called in this process."""

import contextlib
import gc
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.helpers import postgres_server
from tests.helpers.remembered_constructions import remember_constructions

# The suites start hundreds of processes. Each would compile all modules anew where compiled ones must
# not be written.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Before torch is loaded. A thread per core in each of several test processes at once would slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

# While modules are loaded, nothing of them is garbage, and looking for it takes a seventh of the time.
gc.disable()

SHARED = Path(__file__).parents[2] / "shared" / "data"

SMALL = """
task: classification
data: {name: synthetic, examples: 60, classes: 3, size: 32}
model: {name: resnet18_slim, weights: bundled}
recipe:
  optimizer: [sgd, adamw]
  lr: {low: 1e-4, high: 1e-1, log: true}
  momentum: {low: 0.8, high: 0.99, when: {optimizer: sgd}}
  freeze_depth: {low: 0, high: 5}
  epochs: {low: 1, high: 3}
  batch_size: 16
search: {trials: 4, seed: 0, winner: best}
engine: {name: inline, device: cpu}
export: [safetensors]
"""


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@contextlib.contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """A real limit on the bytes of a file, as a full disk. For moments: pytest's own output may be a file that is larger already."""
    limits, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`pytest -n auto`: a process per core, but no more than 4, as each takes up to 2 GB of memory."""
    return min(4, len(os.sched_getaffinity(0)))


def pytest_collection_finish() -> None:
    """Thousands of tests and the modules of torch stay: nobody needs to look for garbage in them again and again."""
    import hypothesis  # noqa: F401 - when it is loaded, it asks the collector who refers to what

    remember_constructions()
    if publishing := sys.modules.get("tuner.training.publishing"):
        publishing.TIMED_CALLS = 3  # type: ignore[attr-defined]  # hundreds of tests export
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`pytest -m gpu` where there is no GPU: each test is skipped, saying so."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip(f"needs a CUDA device; torch {torch.__version__} sees none here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _refuse_missing(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _refuse_missing(report)


def _refuse_missing(report: Report) -> Report:
    """Where TUNER_TESTS_STRICT is set, a test that lacks a program or package fails and is not skipped."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    lacking = "not installed" in reason or "could not import" in reason
    if os.environ.get("TUNER_TESTS_STRICT") and report.skipped and lacking:
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: {reason}; TUNER_TESTS_STRICT is set, so this fails"
    return report


@dataclass(frozen=True)
class CommandResult:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A space file over synthetic images that a trial gets through in a fraction of a second."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def tuner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., CommandResult]]:
    """The command line in this process, in a folder of its own."""
    from tuner.cli import main

    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)

    def call(*words: object) -> CommandResult:
        trial = sys.modules.get("tuner.training.building")
        if trial is not None:
            trial._loaded_datasets.clear()  # a command is a process of its own, which keeps no data from the one before
        monkeypatch.setattr(sys, "argv", ["tuner", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        found = capsys.readouterr()
        return CommandResult(int(end.value.code or 0), found.out, found.err)

    yield call
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def studied(
    tuner: Callable[..., CommandResult], small: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished study of `small` with two trials: run once, a copy for each test."""
    original = tmp_path_factory.getbasetemp() / "studied"
    study = small.parent / "studies" / "small"
    if not original.exists():
        run = tuner("run", small, "search.trials=2")
        assert run.code == 0, run.err
        shutil.copytree(study, original)
        return study
    return Path(shutil.copytree(original, study))


@pytest.fixture
def quick_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch_export` keeps what `safetensors` keeps: for tests of a further format, whichever it is.

    To trace a model takes seconds; test_laws.py and test_outputs.py do it.
    """
    from tuner.export import safetensors, torch_export

    monkeypatch.setattr(torch_export, "save", safetensors.save)
    monkeypatch.setattr(torch_export, "load", safetensors.load)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the project; skips, saying so, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not there: {SHARED}")
    return SHARED


@pytest.fixture(scope="session", name="postgres")
def _postgres() -> Iterator[postgres_server.TestServer]:
    """A PostgreSQL server of the tests' own; skips, saying so, where none is installed."""
    binaries = postgres_server.find_server_programs()
    if binaries is None:
        pytest.skip(
            "PostgreSQL's server programs are not installed (Debian: apt-get install postgresql)"
        )
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install -e '.[test]'")
    with postgres_server.run_server(binaries) as server:
        yield server

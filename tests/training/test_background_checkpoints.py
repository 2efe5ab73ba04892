"""Checkpoints that a thread writes while the training goes on: the same files, the same end, and errors of the disk are heard."""

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.conftest import SMALL, limit_file_size
from tests.helpers.forked_commands import ForkServer, forks
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.core.module_digests import module_digest
from tuner.errors import StorageError
from tuner.files.checkpoint_files import list_checkpoints
from tuner.training import checkpoints, training_loop
from tuner.training.checkpoint_content import TYPE_NAMES, to_pieces
from tuner.training.checkpoints import Checkpoints
from tuner.training.devices import select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, open_checkpoints

EPOCHS = 4


def run() -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {"epochs": EPOCHS, "lr": 0.02, "freeze_depth": 4, "optimizer": "adamw", "ema": 0.9}
    return space.make_run({("recipe", key): value for key, value in chosen.items()}, seed=3)


def attempt(home: Path, folder: Path | None, most: int | None = None) -> list[Any]:
    """Epochs, and the digest of the weights at the end; given up after `most` epochs."""
    r = run()
    context = prepare_training(r, select_device(EngineSettings(device="cpu"), home), "accuracy")
    kept = open_checkpoints(r, context, folder)
    told = [
        [p.epoch.number, p.epoch.loss, p.epoch.scores]
        for p in islice(fit(context, r.recipe, r.seed, kept), most)
    ]
    return [told, module_digest(context.net)]


@pytest.fixture
def _in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "copies_asynchronously", lambda device: True)
    monkeypatch.setattr(checkpoints, "MIN_WRITE_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "MAX_WRITE_SHARE", 1e9)


@pytest.mark.usefixtures("_in_background")
def test_what_a_thread_wrote_goes_on_to_the_bit(tmp_path: Path) -> None:
    straight = attempt(tmp_path, None)
    attempt(tmp_path, tmp_path / "kept", most=2)
    assert list_checkpoints(tmp_path / "kept")
    assert attempt(tmp_path, tmp_path / "kept") == straight
    assert not list((tmp_path / "kept").glob(".*"))


@pytest.mark.usefixtures("_in_background")
def test_the_training_does_not_wait_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All epochs are trained while the first write hangs; no other one begins meanwhile."""
    free, begun, real = threading.Event(), [], Checkpoints.write_file

    def write_file(self: Checkpoints, name: str, *words: Any, **more: Any) -> Path:
        begun.append(name)
        assert threading.current_thread() is not threading.main_thread()
        assert free.wait(60)
        return real(self, name, *words, **more)

    monkeypatch.setattr(Checkpoints, "write_file", write_file)
    r = run()
    context = prepare_training(r, select_device(EngineSettings(device="cpu"), tmp_path), "accuracy")
    kept = open_checkpoints(r, context, tmp_path / "kept")
    numbers = []
    for progress in fit(context, r.recipe, r.seed, kept):
        numbers.append(progress.epoch.number)
        if progress.epoch.number == EPOCHS:
            free.set()
    assert numbers == [1, 2, 3, 4] and begun == ["000001"]
    (path,) = list_checkpoints(tmp_path / "kept")
    header = checkpoints.read_header(path.read_bytes())
    assert [epoch[0] for epoch in header["epochs"]] == [1]


@pytest.mark.usefixtures("_in_background")
def test_26_a_full_disk_reaches_the_training(tmp_path: Path) -> None:
    attempt(tmp_path, None)  # fills the caches
    with pytest.raises(StorageError, match="disk full while writing"), limit_file_size(5000):
        attempt(tmp_path, tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_write_that_kept_the_training_waiting_waits_longer_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write of a tenth of a second comes every two seconds."""
    kept = Checkpoints(tmp_path / "kept", "key", in_background=True)
    written: list[str] = []
    monkeypatch.setattr(
        Checkpoints,
        "_write_generation",
        lambda self, name, read, values, sync: written.append(name),
    )
    monkeypatch.setattr(checkpoints, "collect_state", lambda training: ({}, {}))
    now = kept.last_write
    # each look at the clock: when a write is asked for, and when the training goes on
    looks: Iterator[float] = iter([1.0, 1.1, 2.0, 3.0, 3.2, 3.3])
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now + next(looks))
    for _ in range(4):
        kept.save_if_due(None, [], 0, {})  # type: ignore[arg-type]
        kept.finish()
    assert len(written) == 2 and next(looks, None) is None


def test_the_pieces_of_a_file_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in TYPE_NAMES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "text ü": torch.ones(3)}
    content = b"".join(to_pieces(tensors, {"checkpoint": '{"a": 1}'}))
    found = safetensors.torch.load(content)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].flatten().view(torch.uint8).tolist() == (
            value.flatten().view(torch.uint8).tolist()
        )
    assert int.from_bytes(content[:8], "little") % 8 == 0
    with pytest.raises(ValueError, match=r"a is torch.complex128, which"):
        to_pieces({"a": torch.zeros(1, dtype=torch.complex128)}, {})


# -- killed


def train_in_background(folder: str) -> list[Any]:
    """A training whose checkpoints a thread writes; each is waited for, so that points are passed."""
    training_loop.copies_asynchronously = lambda device: True  # type: ignore[assignment]
    checkpoints.MIN_WRITE_SECONDS, checkpoints.MAX_WRITE_SHARE = 0.0, 1e9  # each epoch
    real = Checkpoints.save_if_due

    def save_if_due(self: Checkpoints, *words: Any) -> None:
        real(self, *words)
        self.finish()

    Checkpoints.save_if_due = save_if_due  # type: ignore[method-assign]
    return attempt(Path(folder) / "home", Path(folder) / "kept")


@pytest.fixture(scope="module")
def forking() -> Iterator[ForkServer]:
    with forks() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("step", ["begun", "written", "synced", "renamed"])
def test_27_killed_while_a_thread_writes(step: str, forking: ForkServer, tmp_path: Path) -> None:
    work = "tests.training.test_background_checkpoints:train_in_background"
    point = f"checkpoint.{step}:3"
    code, said = forking.call_function(tmp_path, work, str(tmp_path), TUNER_CRASH_AT=point)
    assert code == 137, f"{point} was not passed: {said}"
    numbers = [int(path.name.partition("-")[0]) for path in list_checkpoints(tmp_path / "kept")]
    assert max(numbers) == (3 if step == "renamed" else 2)
    code, continued = forking.call_function(tmp_path, work, str(tmp_path))
    assert code == 0, continued
    other = tmp_path / "undisturbed"
    other.mkdir()
    code, straight = forking.call_function(other, work, str(other))
    assert code == 0 and continued == straight
    assert not list((tmp_path / "kept").glob(".*.tmp"))

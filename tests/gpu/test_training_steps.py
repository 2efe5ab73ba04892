"""A training step of every task on a GPU, in both precisions, without waiting for it, and with too little memory.

`pytest -m gpu` runs them where there is a GPU. The same bodies run on the CPU, so that they are known to work.
"""

import contextlib
import math
import resource
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.device_waits import watch_steps
from tests.helpers.tiny_tasks import TINY_TASKS, TinyTask, list_cases
from tuner.config.run import Run
from tuner.training.epoch import TrainingContext, predict_source, train_one_epoch
from tuner.training.micro_batches import release_memory
from tuner.training.training_loop import start_training

EITHER_DEVICE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# without those that take seconds on a CPU, where the test of bfloat16 below trains them too
QUICK_CASES = [case for case in list_cases() if pytest.mark.slow not in case.marks]


@pytest.mark.parametrize(("task", "device"), QUICK_CASES)
def test_an_epoch_trains_on_the_device(task: TinyTask, device: str, tmp_path: Path) -> None:
    run = task.make_run(tmp_path)
    context = task.prepare(run, tmp_path / "home", device)
    before = {name: value.clone() for name, value in context.net.named_parameters()}
    training = start_training(context, run.recipe, run.seed)
    loss = train_one_epoch(context, run.recipe, training, run.seed, 1)
    scores = context.task.score(predict_source(context, context.valid, run.recipe.batch_size))
    assert math.isfinite(loss) and all(map(math.isfinite, scores.values()))
    assert {value.device.type for value in context.net.state_dict().values()} == {device}
    changed = [
        not torch.equal(value, before[name]) for name, value in context.net.named_parameters()
    ]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize(("task", "device"), list_cases())
def test_bfloat16_has_the_loss_of_float32(task: TinyTask, device: str, tmp_path: Path) -> None:
    """The mean loss of an epoch whose steps are too small to change it; a detector draws other regions."""
    losses, weights = {}, {}
    run = task.make_run(tmp_path, "recipe.lr=1e-6")
    for precision in ("float32", "bfloat16"):
        context = task.prepare(run, tmp_path / "home", device, precision=precision)
        training = start_training(context, run.recipe, run.seed)
        losses[precision] = train_one_epoch(context, run.recipe, training, run.seed, 1)
        weights[precision] = torch.cat([w.detach().flatten() for w in context.net.parameters()])
    # autocast is on; a loss of nearly ln 2 can be the same in both
    assert not torch.equal(weights["bfloat16"], weights["float32"])
    draws = task.name in ("detection", "instance_segmentation")
    tolerance = 0.2 if draws else 0.03
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=tolerance)


NO_WAITS = list_cases("classification", "segmentation")
TEXTS_WAIT = list_cases("text_classification", "text_generation")


@pytest.mark.parametrize(("task", "device"), NO_WAITS)
def test_no_step_waits_for_the_device(task: TinyTask, device: str, tmp_path: Path) -> None:
    """Detection is not among them: torchvision's and transformers' own losses wait for the GPU."""
    assert find_waits(task, device, tmp_path) == []


@pytest.mark.xfail(
    reason="a batch is cut to its longest text before it is sent; a CPU cannot tell that from waiting"
)
@pytest.mark.parametrize(("task", "device"), TEXTS_WAIT)
def test_no_step_over_texts_waits_for_the_device(
    task: TinyTask, device: str, tmp_path: Path
) -> None:
    assert find_waits(task, device, tmp_path) == []


def find_waits(task: TinyTask, device: str, tmp_path: Path) -> list[str]:
    """What waits in an epoch's steps after three steps of warm-up, until the loss is read after the last one."""
    run = task.make_run(tmp_path, "recipe.batch_size=2")
    context = task.prepare(run, tmp_path / "home", device)
    training = start_training(context, run.recipe, run.seed)
    steps = -(-len(context.train) // 2) - 1
    with watch_steps(training.optimizer, 3, steps, device) as waits:
        train_one_epoch(context, run.recipe, training, run.seed, 1)
    return waits


class ReadsItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * float(x.mean()) + 0 * x[x > 0].sum()


@pytest.mark.parametrize("device", EITHER_DEVICE)
def test_a_step_that_waits_is_noticed(device: str, tmp_path: Path) -> None:
    task = TINY_TASKS["classification"]
    run = task.make_run(tmp_path)
    context = task.prepare(run, tmp_path / "home", device)
    stages = OrderedDict(reads=ReadsItsInput(), **dict(context.net.named_children()))
    context = replace(context, net=nn.Sequential(stages))
    training = start_training(context, run.recipe, run.seed)
    expected = pytest.raises(RuntimeError) if device == "cuda" else contextlib.nullcontext()
    with expected, watch_steps(training.optimizer, 1, 5, device) as waits:
        train_one_epoch(context, run.recipe, training, run.seed, 1)
    if device == "cpu":
        assert set(waits) == {"_local_scalar_dense", "index by a mask"}


# -- too little memory


class Spread(nn.Module):
    """Spreads each image over a megabyte of numbers, several times: nearly all memory is that of activations."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.narrow, self.classify = nn.Linear(3 * 32 * 32, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.narrow(x.flatten(1))
        wide = hidden[:, :, None] * torch.linspace(0.9, 1.1, 2**16, device=x.device)
        logits: Tensor = self.classify(torch.sin(torch.cos(wide)).mean(2))
        return logits


def build_spread(outputs: int) -> nn.Module:
    return nn.Sequential(Spread(outputs))


def virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


@contextlib.contextmanager
def limit_memory(device: str, more: int) -> Iterator[None]:
    """Only so many bytes more can be allocated on the device: a real limit, by the allocator or by the system."""
    release_memory()
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(0) + more) / total, 0
        )
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, 0)
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def train_spread(
    context: TrainingContext, run: Run, more: int | None, device: str
) -> tuple[float, list[str]]:
    """The loss of an epoch, and the notes about halved batches."""
    training = start_training(context, run.recipe, 1)
    with contextlib.nullcontext() if more is None else limit_memory(device, more):
        loss = train_one_epoch(context, run.recipe, training, 1, 1)
    return loss, training.micro_batch_size.notes


@pytest.mark.gpu
def test_a_batch_is_halved_where_the_gpus_memory_runs_out(tmp_path: Path) -> None:
    check_halved_batches("cuda", tmp_path)


@pytest.mark.slow
def test_a_batch_is_halved_where_the_systems_memory_runs_out(tmp_path: Path) -> None:
    """In a new process: one that ran other tests has memory in reserve, which no limit holds back."""
    code = f"from {__name__} import *; check_halved_batches('cpu', Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def check_halved_batches(device: str, tmp_path: Path) -> None:
    """The loss and the weights are those of the whole batch, up to rounding."""
    task = TINY_TASKS["classification"]
    words = [
        "data.examples=120",
        "recipe.batch_size=64",
        "model=tests.gpu.test_training_steps:build_spread",
    ]
    run = task.make_run(tmp_path, *words)
    results, weights = [], []
    for more in (None, 150 * 2**20):
        context = task.prepare(run, tmp_path / "home", device, precision="float32")
        results.append(train_spread(context, run, more, device))
        weights.append({name: value.cpu() for name, value in context.net.state_dict().items()})
    (whole, no_notes), (halved, notes) = results
    assert no_notes == []
    assert notes and notes[0].startswith("out of memory with 64 examples at once")
    assert halved == pytest.approx(whole, rel=1e-4)
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, atol=1e-5)

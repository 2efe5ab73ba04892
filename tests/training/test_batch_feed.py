"""Batches that are made ahead are those that are made when they are used; where a GPU keeps tensors they are counted once and given back."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import asynchronous_copies
from tests.helpers.asynchronous_copies import DelayedEvent, DelayedStream
from tests.helpers.frozen_prefixes import CountingSource, make_frozen_prefix, make_linear_chain
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings
from tuner.core import device_transfers
from tuner.core.device_transfers import HostCopy
from tuner.core.input_spec import tree_to_dict
from tuner.core.subset import Subset
from tuner.core.types import Batch
from tuner.preprocessing import resident_tensors
from tuner.preprocessing.resident_tensors import ResidentTensors, share_tensors
from tuner.tasks.detection import Detection
from tuner.training import epoch
from tuner.training.activation_cache import CachedSource, CacheLimits, source_behind
from tuner.training.batch_feed import BatchFeed
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import Diverged, LossCheck, TrainingContext
from tuner.training.micro_batches import MicroBatchSize, retry_on_oom
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

CPU = torch.device("cpu")
SetFree = Callable[[int], list[torch.device]]
AUGMENTED = """
task: classification
data: {name: synthetic, examples: 60, size: 32, augment: AUGMENT}
model: {name: resnet18_slim, weights: none}
recipe: {freeze_depth: DEPTH, epochs: 2, batch_size: 16, mixup: 0.4, cutmix: 1.0, ema: 0.9}
"""


class Numbers:
    """The numbers 0 to 99 as examples. `fails` names an index whose batch cannot be made at first."""

    views, digest, lengths = 1, "", None

    def __init__(self, fails: dict[int, Exception] | None = None) -> None:
        self.fails, self.threads = fails or {}, set[int]()

    def __len__(self) -> int:
        return 100

    def take(self, index: Tensor, view: int) -> Batch:
        self.threads.add(threading.get_ident())
        for number in index.tolist():
            if number in self.fails:
                raise self.fails.pop(number)
        return Batch(index.float() + 1, {"a": index + 1})


def halves(index: Tensor) -> tuple[Tensor, ...]:
    return torch.tensor_split(index, 2)


def steps(size: int = 8, group: int = 3) -> list[list[Tensor]]:
    batches = list(torch.arange(100).split(size))
    return [batches[i : i + group] for i in range(0, len(batches), group)]


def read(feed: BatchFeed, wanted: list[int]) -> list[Tensor]:
    return [
        torch.stack([index, batch.x.long() - 1, batch.y["a"] - 1])  # type: ignore[union-attr, call-overload]
        for step in wanted
        for index, batch in feed.parts(step)
    ]


def test_batches_made_ahead_are_those_made_one_by_one() -> None:
    wanted = list(range(len(steps())))
    with BatchFeed(Numbers(), 0, steps(), halves) as feed:
        plain = read(feed, wanted)
    source, stream = Numbers(), DelayedStream()
    with BatchFeed(source, 0, steps(), halves, stream) as feed:
        ahead = read(feed, wanted)
    assert len(plain) == len(ahead) == 26
    assert all(torch.equal(a, b) for a, b in zip(plain, ahead, strict=True))
    assert all(torch.equal(part[0], part[1]) and torch.equal(part[0], part[2]) for part in ahead)
    assert len(stream.threads) == 25 and set(stream.threads) != {threading.get_ident()}
    assert stream.begun == 1  # the first batch is made by the thread that trains


@pytest.mark.parametrize("stream", [None, DelayedStream()])
def test_a_step_that_is_asked_for_again_comes_again_in_the_parts_of_now(
    stream: DelayedStream | None,
) -> None:
    size = MicroBatchSize(9)
    with BatchFeed(Numbers(), 0, steps(), size.split_batch, stream) as feed:
        assert [len(part[0]) for part in read(feed, [0, 1])] == [8] * 6
        next(feed.parts(2))
        size.value = 4
        parts = read(feed, [2, 3, 4])
    assert [len(part[0]) for part in parts] == [4] * 13
    assert torch.cat([part[1] for part in parts]).tolist() == list(range(48, 100))


def test_without_memory_for_it_nothing_is_made_ahead() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.")
    source, stream = Numbers({20: error}), DelayedStream()
    with BatchFeed(source, 0, steps(), halves, stream) as feed:
        parts = read(feed, list(range(5)))
    assert torch.cat([part[1] for part in parts]).tolist() == list(range(100))
    assert len(stream.threads) < 10


def test_an_error_of_the_thread_is_raised_where_its_batch_is_used() -> None:
    source = Numbers({60: OSError("no such disk")})
    with BatchFeed(source, 0, steps(), halves, DelayedStream()) as feed:
        assert len(read(feed, [0, 1])) == 12
        with pytest.raises(OSError, match="no such disk"):
            read(feed, [2])


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


def fitted(
    here: DeviceContext,
    augment: str,
    depth: int = 0,
    change: Callable[[TrainingContext], None] = lambda context: None,
) -> list[Any]:
    """Losses and scores of the epochs, the weights after them, and the notes."""
    text = AUGMENTED.replace("AUGMENT", augment).replace("DEPTH", str(depth))
    run = parsing.parse_space(yaml_document.parse_document(text, "run.yaml")).sample(None, seed=2)
    context = prepare_training(run, here, "accuracy")
    change(context)
    epochs = [progress.epoch for progress in fit(context, run.recipe, run.seed)]
    told = [(epoch.loss, epoch.scores) for epoch in epochs]
    weights = [value.clone() for value in context.net.state_dict().values()]
    return [told, weights, [note for epoch in epochs for note in epoch.notes]]


@pytest.mark.parametrize("augment", ["strong", "flip"])
def test_a_training_on_the_way_of_a_gpu_is_the_plain_one_to_the_bit(
    augment: str, here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fitted(here, augment)
    copies = asynchronous_copies.pretend(monkeypatch)
    streams: list[DelayedStream] = []

    def side_stream(*_: Any) -> DelayedStream:
        streams.append(DelayedStream())
        return streams[-1]

    monkeypatch.setattr(epoch, "side_stream_for", side_stream)
    monkeypatch.setattr(epoch, "STEPS_BETWEEN_CHECKS", 1)
    ahead = fitted(here, augment)
    assert ahead[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(ahead[1], plain[1], strict=True))
    assert len(streams) == 4  # of two epochs; all validation examples are one batch
    assert [len(stream.threads) > 0 for stream in streams] == [True, False] * 2
    assert copies.pinned > 50 and copies.events


class TrueObjects(nn.Module):
    """Finds in each image the one object that `Pictures` says is there."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        corners = torch.tensor([0.0, 0.0, 9.0, 9.0], device=x.device)
        boxes = (x[:, None, None] + corners).double()
        ones = torch.ones(len(x), 1, device=x.device)
        return {"boxes": boxes, "scores": ones, "labels": 0 * ones.long()}


class Pictures(Numbers):
    """Each of the hundred has one object, at its number."""

    def take(self, index: Tensor, view: int) -> Batch:
        found = TrueObjects()(index.float())
        return Batch(index.float(), {name: found[name] for name in ("boxes", "labels")})


def test_objects_are_scored_while_the_next_batch_is_computed(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Detection(("object",), 0.5)
    on_device = task.predict(TrueObjects().to("meta"), torch.zeros(2, device="meta"))
    assert {value.device.type for value in on_device.values()} == {"meta"}  # type: ignore[union-attr]
    assert on_device["boxes"].dtype == torch.float32  # type: ignore[call-overload]
    asynchronous_copies.pretend(monkeypatch)
    happened: list[str] = []
    monkeypatch.setattr(DelayedEvent, "synchronize", lambda event: happened.append("waited"))
    net = TrueObjects()
    net.register_forward_hook(lambda *_: happened.append("computed"))
    context = cast(TrainingContext, SimpleNamespace(net=net, task=task, device_context=here))
    monkeypatch.setattr(epoch, "side_stream_for", lambda *_: None)
    scores, pairs = epoch.score_source(context, Pictures(), batch_size=10)
    assert scores["map"] == 1.0
    assert [len(truth["labels"]) for _, truth in pairs] == [40, 40, 20]
    waits = ["waited"] * 2  # for the prediction and for the target
    assert happened == ["computed", "computed", *waits, "computed", *waits, *waits]


def test_a_loss_is_looked_at_when_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    asynchronous_copies.pretend(monkeypatch)
    monkeypatch.setattr(epoch, "STEPS_BETWEEN_CHECKS", 2)
    check = LossCheck(3, CPU)
    one, nan = ({"loss": torch.tensor(value)} for value in (1.0, float("nan")))
    for parts in (one, nan, one):
        check.add(parts, 4)
    with pytest.raises(Diverged, match=r"^loss nan at step 2 in epoch 3$"):
        check.add(one, 4)
    check = LossCheck(1, CPU)
    for loss in (1.0, 2.0, 3.0):
        check.add({"loss": torch.tensor(loss)}, 4)
    assert check.finish() == 24.0


def test_a_copy_is_of_the_moment_at_which_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        value = torch.ones(3)
        copy = HostCopy({"a": value})
        value.zero_()
        assert copy.wait()["a"].tolist() == [1, 1, 1]
        copies = asynchronous_copies.pretend(monkeypatch)
    assert all(event.waited for event in copies.events)


def test_rows_are_gathered_alike_on_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    values, rows = torch.randn(20, 3, 2), torch.randint(20, (4, 5))
    plain = device_transfers.gather_rows(values, rows, CPU)
    copies = asynchronous_copies.pretend(monkeypatch)
    assert torch.equal(device_transfers.gather_rows(values, rows, CPU), plain)
    assert copies.pinned == 1


# -- what a GPU keeps


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SetFree:
    """Pretends that so many bytes of a device are free besides what it keeps; gives each question for it."""
    resident_tensors.give_back_memory()

    def set_free(count: int) -> list[torch.device]:
        questions: list[torch.device] = []

        def available_bytes(device: torch.device) -> int:
            questions.append(device)
            return count

        monkeypatch.setattr(resident_tensors, "available_bytes", available_bytes)
        return questions

    return set_free


def test_what_a_device_keeps_is_counted_once_and_has_a_share_of_its_memory(
    memory: SetFree,
) -> None:
    memory(1000)
    values = {"a": torch.ones(300, dtype=torch.uint8)}
    first = share_tensors(values, CPU)
    assert share_tensors(values, CPU) is first
    assert first.is_resident() and first.tensors["a"] is not values["a"]
    memory(700)  # without the 300 that are kept
    second = ResidentTensors({"b": torch.ones(300, dtype=torch.uint8)}, CPU)
    assert not second.is_resident() and second.tensors is second.on_cpu
    assert ResidentTensors({"b": torch.ones(150, dtype=torch.uint8)}, CPU).is_resident()


def test_copies_leave_free_what_a_training_needs_at_each_step(
    memory: SetFree, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(1000)
    values = {"a": torch.ones(300, dtype=torch.uint8)}
    monkeypatch.setattr(resident_tensors, "needed_again", lambda device: 701)
    assert not ResidentTensors(values, CPU).is_resident()
    monkeypatch.setattr(resident_tensors, "needed_again", lambda device: 700)
    assert ResidentTensors(values, CPU).is_resident()


def test_what_is_kept_is_given_back_before_a_batch_is_halved(
    memory: SetFree,
) -> None:
    memory(1000)
    kept = ResidentTensors({"a": torch.arange(10)}, CPU)
    assert kept.is_resident()

    def compute() -> int:
        if kept.on_device is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 5

    size = MicroBatchSize(9, minimum=9)
    assert retry_on_oom(compute, size, 8) == 5
    assert size.value == 9 and kept.tensors is kept.on_cpu
    assert size.notes == [
        "out of memory; images and activations that the GPU kept are read from files again"
    ]


def test_pixels_in_the_memory_of_the_device_train_to_the_bit_as_those_in_files(
    memory: SetFree, here: DeviceContext
) -> None:
    plain = fitted(here, "flip")
    assert resident_tensors.resident_bytes(CPU) == 0
    questions = memory(10**9)
    kept = fitted(here, "flip")
    assert kept[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], plain[1], strict=True))
    assert len(questions) == 1  # training and validation images are rows of the same tensor


def test_activations_leave_when_training_needs_the_room_and_the_batch_stays_whole(
    memory: SetFree, tmp_path: Path
) -> None:
    here = select_device(EngineSettings(device="cpu", cache="always"), tmp_path)
    plain = fitted(here, "flip", depth=5)
    assert plain[2] == [] and resident_tensors.resident_bytes(CPU) == 0
    memory(10**9)
    sizes: list[int] = []

    def run_out_once(context: TrainingContext) -> None:
        loss_parts = context.task.loss_parts

        def losses(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
            sizes.append(len(next(iter(tree_to_dict(batch.y).values()))))
            if len(sizes) == 3:
                assert resident_tensors.has_resident_tensors()
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss_parts(net, batch)

        context.task.loss_parts = losses  # type: ignore[method-assign]

    crowded = fitted(here, "flip", depth=5, change=run_out_once)
    assert crowded[2] == [
        "out of memory; images and activations that the GPU kept are read from files again"
    ]
    assert sizes[2] == sizes[3] == 16  # the step that failed comes again, in one part
    assert crowded[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(crowded[1], plain[1], strict=True))


def test_views_and_subsets_share_one_allowance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry has 8 examples of 12 bytes, and 8 of its target."""
    resident_tensors.give_back_memory()
    free = 800
    monkeypatch.setattr(
        resident_tensors,
        "available_bytes",
        lambda device: free - resident_tensors.resident_bytes(device),
    )
    limits, prefix = CacheLimits(tmp_path, mode="always"), make_frozen_prefix(make_linear_chain(3))
    source = CountingSource()
    whole = source_behind(prefix, source, limits)
    part = source_behind(prefix, Subset(source, torch.tensor([1, 3]), "odd"), limits)
    deeper = source_behind(make_frozen_prefix(make_linear_chain(3, 3)), source, limits)
    resident = []
    for behind, view in ((whole, 0), (part, 0), (whole, 1), (part, 1), (deeper, 0)):
        assert isinstance(behind, CachedSource)
        resident.append(behind.is_resident(view))
    assert resident == [True, True, True, True, False]  # 480 bytes would be more than half
    assert resident_tensors.resident_bytes(CPU) == 320
    del whole, part, behind  # as when a trial ends: what it kept leaves with it
    assert isinstance(deeper, CachedSource)
    again = source_behind(make_frozen_prefix(make_linear_chain(3, 3)), source, limits)
    assert resident_tensors.resident_bytes(CPU) == 0 and isinstance(again, CachedSource)
    del deeper
    assert again.is_resident(0)

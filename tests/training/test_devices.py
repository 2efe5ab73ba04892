"""Which GPU a worker gets, and how much of it. torch.cuda is replaced at its edge: no GPU is needed, and none was used."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CommandResult
from tuner.commands.run import worker_count
from tuner.config.run import EngineSettings
from tuner.errors import StorageError
from tuner.messages import Assignment
from tuner.preprocessing import resident_tensors
from tuner.training import devices, worker_jobs
from tuner.training.data_parallel import Ranks
from tuner.training.devices import select_device, select_gpus

Tuner = Callable[..., CommandResult]
CURRENT: list[torch.device] = []  # GPUs that became the current one


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A machine with four GPUs of 80 GB; filled with the share of each that was asked for."""
    shares: dict[str, float] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: shares.update({str(device): share}),
    )
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda device: shares.get(str(device), 1.0)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80_000, 80_000))
    monkeypatch.setattr(torch.cuda, "set_device", CURRENT.append)
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield shares
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize(
    ("engine", "used", "of_slots"),
    [
        ({}, (0, 1, 2, 3), "0 1 2 3 0"),
        ({"device": "cuda"}, (0, 1, 2, 3), "0 1 2 3 0"),
        ({"gpus": 2}, (0, 1), "0 1 0 1 0"),
        ({"gpus": [3, 1]}, (3, 1), "3 1 3 1 3"),
        ({"device": "cuda:2"}, (2,), "2 2 2 2 2"),
        ({"gpus": [3, 1], "per_gpu": 2}, (3, 1), "3 1 3 1 3"),
    ],
)
def test_workers_are_dealt_out_over_the_gpus_in_use(
    engine: dict[str, Any],
    used: tuple[int, ...],
    of_slots: str,
    four: dict[str, float],
    tmp_path: Path,
) -> None:
    asked = EngineSettings.model_validate(engine)
    assert select_gpus(asked) == used
    assert [str(select_device(asked, tmp_path, slot).device) for slot in range(5)] == [
        f"cuda:{n}" for n in of_slots.split()
    ]


@pytest.mark.parametrize(("rank", "of_slots"), [(0, "0 2 0"), (1, "1 3 1")])
def test_the_ranks_of_a_slot_have_gpus_of_their_own(
    rank: int,
    of_slots: str,
    four: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "joined_ranks", lambda: Ranks(rank, 2))
    asked = EngineSettings(gpus_per_trial=2)
    contexts = [select_device(asked, tmp_path, slot) for slot in range(3)]
    assert [str(context.device) for context in contexts] == [f"cuda:{n}" for n in of_slots.split()]
    assert {context.ranks.rank for context in contexts} == {rank}


def test_a_trial_gets_no_more_gpus_than_there_are(four: dict[str, float]) -> None:
    assert select_gpus(EngineSettings(gpus_per_trial=4)) == (0, 1, 2, 3)
    for engine, seen in (({"gpus": 2}, "2 GPUs"), ({"gpus": [3]}, "1 GPU"), ({}, "4 GPUs")):
        asked = EngineSettings.model_validate({"gpus_per_trial": 5, **engine})
        with pytest.raises(StorageError, match=f"engine.gpus_per_trial: 5, but .* has {seen} to "):
            select_gpus(asked)
    assert select_gpus(EngineSettings(device="cpu", gpus_per_trial=9)) == ()


def test_the_gpu_of_a_slot_is_the_current_one_and_computes_fast(
    four: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = select_device(EngineSettings(), tmp_path, 2)
    assert str(CURRENT[-1]) == "cuda:2" and context.precision == "bfloat16"
    assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "high"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for capability, precision in (((7, 5), "float16"), ((6, 1), "float32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert select_device(EngineSettings(), tmp_path).precision == precision


def test_on_the_cpu_nothing_of_this_is_set(tmp_path: Path) -> None:
    CURRENT.clear()
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    context = select_device(EngineSettings(device="cpu"), tmp_path)
    assert context.precision == "float32" and CURRENT == []
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.benchmark == benchmark


@pytest.mark.parametrize(
    ("engine", "share"),
    [
        ({}, 1.0),  # the whole, also after it was shared
        ({"per_gpu": 3}, 1 / 3),
        ({"gpus": 1, "per_gpu": 4}, 1 / 4),
        ({"workers": 8}, 1 / 2),  # more workers than GPUs share them too
        ({"workers": 8, "gpus": 1}, 1 / 8),
        ({"workers": 4}, 1.0),
        ({"name": "ray", "workers": 8}, None),  # they are on other machines
        ({"workers": 2, "per_gpu": 2}, 1 / 2),
        ({"workers": 4, "gpus_per_trial": 2}, 1 / 2),
    ],
)
def test_workers_that_share_a_gpu_share_its_memory(
    engine: dict[str, Any], share: float | None, four: dict[str, float], tmp_path: Path
) -> None:
    select_device(EngineSettings.model_validate(engine), tmp_path, 0)
    assert four == ({} if share is None else {"cuda:0": pytest.approx(share)})


def test_a_worker_keeps_tensors_in_half_of_its_part_of_the_gpu(
    four: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1_500)
    device = select_device(EngineSettings(per_gpu=1), tmp_path).device
    assert resident_tensors.available_bytes(device) == 79_000
    assert resident_tensors.fits(39_000, device) and not resident_tensors.fits(40_000, device)
    select_device(EngineSettings(per_gpu=4), tmp_path)
    assert resident_tensors.available_bytes(device) == 19_000
    assert resident_tensors.fits(9_000, device) and not resident_tensors.fits(10_000, device)


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        ([], 4),
        (["per_gpu=2"], 8),
        (["gpus=1", "per_gpu=3"], 3),
        (["gpus=[0, 3]"], 2),
        (["workers=5", "per_gpu=2"], 5),
        (["device=cuda:1"], 1),
        (["per_gpu=auto"], 4),  # until the first trials are measured
        (["gpus_per_trial=2"], 2),
        (["gpus_per_trial=3"], 1),
    ],
)
def test_one_worker_per_gpu_unless_the_file_says_otherwise(
    words: list[str], workers: int, four: dict[str, float], small: Path
) -> None:
    from tuner.config import parsing, yaml_document

    doc = parsing.apply_overrides(
        yaml_document.read_document(small),
        ["engine={name: local}", *(f"engine.{word}" for word in words)],
    )
    space = parsing.parse_space(doc)
    orders = tuple(
        Assignment(run, "accuracy", space.settings.engine, str(small.parent))
        for run in space.plugin_combinations()
    )
    found = worker_jobs.survey_models(orders, lambda _: True, 0)
    assert worker_count(space, found.gpu_count) == workers


def test_without_a_gpu_there_is_one_worker_on_the_cpu(small: Path) -> None:
    from tuner.config import parsing, yaml_document

    assert (
        worker_count(
            parsing.parse_space(
                parsing.apply_overrides(yaml_document.read_document(small), ["engine={per_gpu: 2}"])
            ),
            0,
        )
        == 1
    )


def test_a_gpu_that_is_not_there_is_named_with_those_that_are(four: dict[str, float]) -> None:
    with pytest.raises(
        StorageError, match=r"engine.gpus: \[0, 7\], but torch sees 4 GPUs, cuda:0 to cuda:3"
    ):
        select_gpus(EngineSettings(gpus=[0, 7]))
    with pytest.raises(StorageError, match=r"engine.gpus: 5, but torch sees 4 GPUs"):
        select_gpus(EngineSettings(gpus=5))
    with pytest.raises(StorageError, match=r"engine.device: cuda:4, but torch sees 4 GPUs"):
        select_gpus(EngineSettings(device="cuda:4"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["engine.gpus=0"],
            "engine.gpus: write how many GPUs, at least 1, or their numbers, such as [0, 2]; for none, device: cpu, got 0",
        ),
        (["engine.gpus=[]"], "engine.gpus: write the GPUs' numbers"),
        (["engine.gpus=[1, 1]"], "engine.gpus: write the GPUs' numbers"),
        (["engine.gpus=[-1]"], "engine.gpus: write the GPUs' numbers"),
        (["engine.gpus=two"], "engine.gpus: expected a whole number, a list or null"),
        (["engine.gpus={low: 1, high: 2}"], "engine holds no ranges or choices"),
        (["engine.per_gpu=0"], "engine.per_gpu: must be at least 1"),
        (["engine.device=auto", "engine.per_gpu=[1, 2]"], "engine holds no ranges or choices"),
        (["engine.gpus=1"], "engine.gpus: which GPUs is already said by device: cpu"),
        (
            ["engine.device=cuda:1", "engine.gpus=[0]"],
            "engine.gpus: which GPUs is already said by device: cuda:1",
        ),
        (
            ["engine.per_gpu=2"],
            "engine.per_gpu: is for GPUs, and device is cpu; for several workers write workers: 2",
        ),
        (["engine.workers=0"], "engine.workers: must be at least 1, got 0"),
        (
            ["engine={name: local, per_gpu: auto, workers: 3}"],
            "engine.per_gpu: auto, but workers: 3 already says how many there are; keep one of the two",
        ),
        (
            ["engine={name: local, gpus_per_trial: 0.5}"],
            "engine.gpus_per_trial: a whole number of GPUs, at least 1, got 0.5; for several trials on one GPU write per_gpu: 2",
        ),
        (
            ["engine={name: local, gpus_per_trial: 2, per_gpu: auto}"],
            "engine.gpus_per_trial: 2, and per_gpu: auto; a trial has several GPUs, or a part of one",
        ),
        (
            ["engine.gpus_per_trial=2"],
            "engine.gpus_per_trial: 2, but the engine inline has one process; write name: local",
        ),
        (
            ["engine={name: local, device: 'cuda:1', gpus_per_trial: 2}"],
            "engine.gpus_per_trial: 2, but device: cuda:1 is one GPU; write device: cuda",
        ),
    ],
)
def test_wrong_values_are_named_before_anything_is_made(
    words: list[str], message: str, tuner: Tuner, small: Path
) -> None:
    said = tuner("run", small, *words)
    assert said.code == 2 and message in said.err and not (small.parent / "studies").exists()


@pytest.mark.parametrize("value", ["2", "[0]"])
def test_31_gpus_where_there_are_none_end_before_anything_is_made(
    value: str, tuner: Tuner, small: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = tuner("run", small, "engine.device=auto", f"engine.gpus={value}")
    assert said.code == 4 and f"engine.gpus: {value}" in said.err and "sees no GPU here" in said.err
    assert not (small.parent / "studies").exists()


@pytest.mark.slow  # a worker starts
def test_31_several_gpus_where_there_is_none_end_before_anything_is_made(
    tuner: Tuner, small: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = tuner("run", small, "engine={name: local, gpus_per_trial: 2}")
    assert said.code == 4 and "engine.gpus_per_trial: 2, but torch" in said.err
    assert "has no GPU to use here; write a smaller number, or leave gpus_per_trial out" in said.err
    assert not (small.parent / "studies").exists()


def test_the_keys_survive_writing_and_reading(small: Path) -> None:
    from tuner.config import parsing, yaml_document
    from tuner.config.space import dump_yaml

    space = parsing.parse_space(
        parsing.apply_overrides(
            yaml_document.read_document(small), ["engine={name: local, gpus: [2, 0], per_gpu: 3}"]
        )
    )
    again = parsing.parse_space(
        yaml_document.parse_document(dump_yaml(space.to_dict()), "again.yaml")
    )
    assert again.settings.engine == space.settings.engine and space.settings.engine.gpus == [2, 0]

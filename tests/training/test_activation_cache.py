"""What the cache keeps, what it recomputes, and what it throws away first. That it agrees with its twin: test_laws.py."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import SMALL
from tests.helpers.frozen_prefixes import (
    CountingSource,
    Step,
    make_frozen_prefix,
    make_linear_chain,
)
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings
from tuner.core.subset import Subset
from tuner.files.cache_entries import evict_until_fits
from tuner.preprocessing import resident_tensors
from tuner.preprocessing.resident_tensors import ResidentTensors
from tuner.training import cache_filling
from tuner.training.activation_cache import CachedSource, CacheLimits, source_behind
from tuner.training.devices import select_device
from tuner.training.frozen_prefix import UncachedSource
from tuner.training.preparation import prepare_training


class Taps(nn.Module):
    """A prefix that gives a flat dict, as one with skip connections does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"skip": x, "map": self.fc(x)[:, :, None, None].expand(-1, -1, 2, 4)}


def prefix() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Taps()).eval()


def remembered(home: Path, source: CountingSource) -> CachedSource:
    found = source_behind(make_frozen_prefix(prefix()), source, CacheLimits(home, mode="always"))
    assert isinstance(found, CachedSource)
    return found


def test_a_dict_of_tensors_is_remembered_with_its_shapes(tmp_path: Path) -> None:
    source = CountingSource()
    cached, live = (
        remembered(tmp_path, source),
        UncachedSource(make_frozen_prefix(prefix()), CountingSource()),
    )
    index = torch.tensor([6, 1])
    for view in (0, 1, 3):
        got, wanted = cached.take(index, view), live.take(index, view % 2)
        assert (
            isinstance(got.x, dict)
            and isinstance(wanted.x, dict)
            and list(got.x) == ["skip", "map"]
        )
        assert got.x["map"].shape == (2, 3, 2, 4)
        assert all(torch.allclose(got.x[k], wanted.x[k]) for k in wanted.x) and got.y.tolist() == [
            6,
            1,
        ]


def test_each_view_is_computed_once_and_later_sources_ask_nothing(tmp_path: Path) -> None:
    source, index = CountingSource(), torch.arange(8)
    first = remembered(tmp_path, source)
    for _ in range(3):
        first.take(index, 0)
    assert source.take_count == 8
    again = CountingSource()
    remembered(tmp_path, again).take(index, 0)
    assert again.take_count == 0


@pytest.mark.parametrize("harm", ["meta", "truncated", "gone"])
def test_a_damaged_entry_is_computed_again(harm: str, tmp_path: Path) -> None:
    index = torch.arange(8)
    wanted = remembered(tmp_path, CountingSource()).take(index, 0).x
    (entry,) = [p for p in (tmp_path / "activations").iterdir() if p.is_dir()]
    if harm == "meta":
        (entry / "meta.json").write_text("")
    elif harm == "truncated":
        os.truncate(entry / "1.bin", 5)
    else:
        (entry / "0.bin").unlink()
    got = remembered(tmp_path, CountingSource()).take(index, 0).x
    assert (
        isinstance(got, dict)
        and isinstance(wanted, dict)
        and torch.equal(got["map"], wanted["map"])
    )


def test_other_weights_other_data_or_another_precision_have_another_key(tmp_path: Path) -> None:
    other = CountingSource()
    other.digest = "other"
    torch.manual_seed(1)
    keys = [
        remembered(tmp_path, CountingSource()).entry_folder(1, 0),
        remembered(tmp_path, other).entry_folder(1, 0),
        *(
            f.entry_folder(1, 0)
            for f in (
                source_behind(
                    make_frozen_prefix(nn.Sequential(Taps()).eval()),
                    CountingSource(),
                    CacheLimits(tmp_path, mode="always"),
                ),
                source_behind(
                    make_frozen_prefix(prefix(), "bfloat16"),
                    CountingSource(),
                    CacheLimits(tmp_path, mode="always"),
                ),
            )
            if isinstance(f, CachedSource)
        ),
    ]
    assert len(set(keys)) == 4


def test_the_least_recently_used_entry_goes_first(tmp_path: Path) -> None:
    old, new, middle = (letter * 32 for letter in "abc")  # entries are known by such names
    for name, age in ((old, 300), (new, 100), (middle, 200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.bin").write_bytes(bytes(8))
        (tmp_path / name / "sha256.json").write_text("{}")  # the mark of an entry
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    evict_until_fits(tmp_path, 5, byte_limit=30)
    assert {p.name for p in tmp_path.iterdir()} == {middle, new}
    evict_until_fits(tmp_path, 5, byte_limit=10)
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_is_left_when_computing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = remembered(tmp_path, CountingSource())
    monkeypatch.setattr(json, "dumps", lambda *_: pytest.fail("stop"))
    with pytest.raises(BaseException, match="stop"):
        cached.take(torch.arange(2), 0)
    assert [p.suffix for p in (tmp_path / "activations").iterdir()] == [".lock"]


def passed(stages: nn.Sequential) -> list[int]:
    return [stage.passed for stage in stages if isinstance(stage, Step)]


def test_one_pass_keeps_what_it_passes_where_that_is_small(tmp_path: Path) -> None:
    every = CacheLimits(tmp_path, mode="always")
    whole = make_linear_chain(1, 5, 1, 1)
    source_behind(make_frozen_prefix(whole), CountingSource(), every).take(torch.arange(8), 0)
    assert passed(whole) == [8, 8, 8, 8]
    for depth, asked in (
        (1, 0),
        (3, 0),
        (2, 8),
    ):  # what left the second stage is larger than what came in
        part, source = make_linear_chain(1, 5, 1, 1)[:depth], CountingSource()
        found = source_behind(make_frozen_prefix(part), source, every).take(torch.arange(8), 0).x
        assert isinstance(found, Tensor) and torch.allclose(
            found, part(CountingSource().take(torch.arange(8), 0).x)
        )
        assert (
            sum(stage.passed for stage in part if isinstance(stage, Step)) - 8 * depth == asked
            and source.take_count == 0
        )


def test_filling_begins_at_the_nearest_cut_that_is_kept(tmp_path: Path) -> None:
    every = CacheLimits(tmp_path, mode="always")
    source_behind(make_frozen_prefix(make_linear_chain(3, 2)), CountingSource(), every).take(
        torch.arange(8), 1
    )
    deeper, source = make_linear_chain(3, 2, 2), CountingSource()
    found = source_behind(make_frozen_prefix(deeper), source, every).take(torch.arange(8), 1).x
    assert passed(deeper) == [0, 0, 8] and source.take_count == 0
    assert isinstance(found, Tensor) and torch.allclose(
        found, deeper(CountingSource().take(torch.arange(8), 1).x)
    )


@pytest.mark.parametrize(("computing", "kept"), [(1e-9, False), (1.0, True)])
def test_what_is_sooner_computed_than_read_is_not_kept(
    computing: float, kept: bool, tmp_path: Path
) -> None:
    stages, auto = make_frozen_prefix(make_linear_chain(3)), CacheLimits(tmp_path)
    source_behind(stages, CountingSource(), auto)
    (note,) = (tmp_path / "activations").glob("*.cost.json")
    known = json.loads(note.read_text())
    assert set(known) == {"computing", "reading", "bytes"} and known["bytes"] == 12
    note.write_text(json.dumps({"computing": computing, "reading": 1e-6, "bytes": 12.0}))
    source = CountingSource()
    assert isinstance(source_behind(stages, source, auto), CachedSource) == kept
    assert source.take_count <= 1  # the time was not taken again


# -- memory


class Hungry(nn.Module):
    """A stage for which the memory runs out above some number of examples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.sizes = most, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return 2 * x


def test_filling_goes_on_in_smaller_chunks_where_the_memory_runs_out(tmp_path: Path) -> None:
    stage, source = Hungry(4), CountingSource()
    source_behind(make_frozen_prefix(nn.Sequential(stage)), source, CacheLimits(tmp_path))
    assert stage.sizes == [8] + 6 * [4]  # each half is timed thrice
    stage.sizes.clear()
    behind = remembered_behind(tmp_path, stage, source)
    got = behind.take(torch.arange(8), 0).x
    assert isinstance(got, Tensor) and got.flatten().tolist() == [2.0 * i for i in range(8)]
    assert stage.sizes == [8, 4, 4]


def remembered_behind(home: Path, stage: nn.Module, source: CountingSource) -> CachedSource:
    frozen = make_frozen_prefix(nn.Sequential(stage))
    behind = source_behind(frozen, source, CacheLimits(home, mode="always"))
    assert isinstance(behind, CachedSource)
    return behind


class Many(CountingSource):
    def __len__(self) -> int:
        return 600


@pytest.mark.parametrize(
    ("in_main_memory", "on_gpu", "needed_on_gpu", "length"),
    [
        (1e12, 0, 0, 64),  # as many as the frozen prefix takes at most
        (4 * 16 * 20, 0, 0, 16),  # 20 examples of 16 bytes are a quarter of it
        (1, 0, 0, 1),
        (1e12, 10**9, 8 * 1000, 512),
        (1e12, 4 * 1000 * 130, 8 * 1000, 128),
        (4 * 16 * 40, 10**9, 8 * 1000, 32),  # the outputs are collected in main memory
        (1e12, 0, 8 * 1000, 1),
    ],
)
def test_a_chunk_has_as_many_examples_as_fit_what_is_free(
    in_main_memory: float,
    on_gpu: int,
    needed_on_gpu: int,
    length: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_filling, "available_main_memory", lambda: in_main_memory)
    monkeypatch.setattr(cache_filling, "available_bytes", lambda device: on_gpu)
    monkeypatch.setattr(
        cache_filling, "measure_need", lambda compute, device: (compute(), needed_on_gpu)
    )
    stage, index = Hungry(10_000), torch.arange(600)
    got = remembered_behind(tmp_path, stage, Many()).take(index, 0).x
    assert isinstance(got, Tensor) and torch.equal(got, 2.0 * index[:, None])
    whole, rest = divmod(600 - 8, length)
    assert stage.sizes == [8, *whole * [length], *([rest] if rest else [])]


def test_what_a_gpu_keeps_is_given_back_before_one_example_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_tensors, "available_bytes", lambda device: 10**6)
    kept = ResidentTensors({"a": torch.ones(3)}, torch.device("cpu"))
    assert kept.is_resident()

    class Crowded(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            self.most = 0 if kept.on_device is not None else 10
            return super().forward(x)

    stage = Crowded(0)
    got = remembered_behind(tmp_path, stage, CountingSource()).take(torch.arange(8), 0).x
    assert isinstance(got, Tensor) and got.flatten().tolist() == [2.0 * i for i in range(8)]
    assert stage.sizes == [8, 4, 2, 1] + 8 * [1]


def test_an_example_that_alone_is_too_much_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    behind = remembered_behind(tmp_path, Hungry(0), CountingSource())
    with pytest.raises(torch.OutOfMemoryError):
        behind.take(torch.arange(2), 0)
    assert [path.suffix for path in (tmp_path / "activations").iterdir()] == [".lock"]


def test_other_errors_of_a_stage_are_not_tried_again(tmp_path: Path) -> None:
    class Broken(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            self.sizes.append(len(x))
            raise RuntimeError("shapes cannot be multiplied")

    stage = Broken(8)
    with pytest.raises(RuntimeError, match="shapes"):
        remembered_behind(tmp_path, stage, CountingSource()).take(torch.arange(2), 0)
    assert stage.sizes == [8]


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_no_more_than_four_training_batches_are_computed_at_once(mode: str, tmp_path: Path) -> None:
    """The memory is sized for training batches; large images would not fit 64 at once."""
    recipe = {
        "freeze_depth": 2,
        "batch_size": 2,
        "head": "fresh",
        "epochs": 1,
        "lr": 0.01,
        "momentum": 0.9,
    }
    words = [f"recipe.{key}={value}" for key, value in {**recipe, "optimizer": "sgd"}.items()]
    document = yaml_document.parse_document(SMALL, "small.yaml")
    run = parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=5)
    device = select_device(
        EngineSettings.model_validate({"device": "cpu", "cache": mode}), tmp_path
    )
    sizes: list[int] = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    with hook:
        prepare_training(run, device, "accuracy").train.take(torch.arange(2), 0)
    assert max(sizes) == 8


# -- subsets


def odd_ones(source: CountingSource) -> Subset:
    return Subset(source, torch.tensor([1, 3, 5, 7]), "odd")


def test_subsets_read_the_entry_of_the_whole(tmp_path: Path) -> None:
    source, stages = CountingSource(), make_frozen_prefix(prefix())
    always = CacheLimits(tmp_path, mode="always")
    whole, odd = (source_behind(stages, s, always) for s in (source, odd_ones(source)))
    got, expected = odd.take(torch.tensor([3, 0]), 1), whole.take(torch.tensor([7, 1]), 1)
    assert len(odd) == 4 and source.take_count == 8
    assert isinstance(got.x, dict) and isinstance(expected.x, dict)
    assert torch.equal(got.x["map"], expected.x["map"]) and torch.equal(got.y, expected.y)  # type: ignore[arg-type]
    assert isinstance(odd, CachedSource) and isinstance(whole, CachedSource)
    assert odd.readers[1] is whole.readers[1]  # a GPU has the activations once


def test_where_the_whole_is_too_large_a_subset_is_kept_alone(tmp_path: Path) -> None:
    stages, source = make_frozen_prefix(make_linear_chain(4)), CountingSource()
    limits = CacheLimits(tmp_path, gigabytes=200e-9)  # 16 bytes an example and view
    source_behind(stages, source, limits)
    (note,) = (tmp_path / "activations").glob("*.cost.json")
    note.write_text(json.dumps({"computing": 1.0, "reading": 1e-6, "bytes": 16.0}))
    assert isinstance(source_behind(stages, source, limits), UncachedSource)
    odd = source_behind(stages, odd_ones(source), limits)
    assert isinstance(odd, CachedSource) and odd.rows is None and len(odd.uncached) == 4

"""Entries of the caches: damage of any kind is noticed, named and mended; what is read is never removed; the limit holds."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.frozen_prefixes import CountingSource, make_frozen_prefix, make_linear_chain
from tuner.core.input_spec import ImageInputSpec, TextInputSpec
from tuner.files import cache_entries
from tuner.files.atomic import atomic_path, lock_path, remove_leftovers
from tuner.files.cache_entries import (
    evict_entry,
    evict_until_fits,
    make_space,
    try_open,
    write_checksums,
)
from tuner.preprocessing.image_store import open_image_store
from tuner.training.activation_cache import CachedSource
from tuner.training.frozen_prefix import UncachedSource
from tuner.training.linear_probe import load_or_solve_probe

ROOT = Path(__file__).parents[2]
SIDE = ImageInputSpec(64, 64, "bilinear", (0.0,) * 3, (1.0,) * 3)
BLOCK = 4096


# -- damage: each kind of cache as what it gives, from a folder of its own


def images(home: Path) -> Any:
    pictures = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8) for i in range(3)]
    return open_image_store(home, pictures, SIDE, "error").pixels.clone()


def activations(home: Path) -> Any:
    (home / "activations").mkdir(parents=True, exist_ok=True)
    cached = CachedSource(
        UncachedSource(make_frozen_prefix(make_linear_chain(2, 600)), CountingSource()),
        home / "activations",
        1e9,
    )
    return cached.take(torch.arange(8), 1).x


def tokens(home: Path) -> Any:
    pytest.importorskip("transformers")
    from tests.helpers import small_transformers
    from tuner.preprocessing import tokenization as encoding

    if not (home / "bert").exists():
        small_transformers.write_model_folder(home, "bert", weights=False)
    found = encoding.open_token_store(
        home,
        TextInputSpec(str(home / "bert"), 40),
        [text for text, _ in small_transformers.make_corpus(60)],
        None,
    )
    return found.tensors["input_ids"].clone()


def probe(home: Path) -> Any:
    torch.manual_seed(0)
    head = nn.Linear(40, 60)

    def train() -> None:
        with torch.no_grad():
            head.weight += torch.arange(2400).view(60, 40)

    load_or_solve_probe(head, home / "probes", "key", train)
    return head.weight.detach().clone()


KINDS = {"images": images, "activations": activations, "tokens": tokens, "probes": probe}


def harms(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of damage to one file, each with its name."""
    size = path.stat().st_size
    for length in range(0, size, BLOCK):
        yield f"cut at {length}", lambda length=length: os.truncate(path, length)
    for at in {0, size // 2, size - 1}:
        yield f"byte {at}", lambda at=at: flip(path, at)
    yield "longer", lambda: path.write_bytes(path.read_bytes() + b"\0")
    yield "gone", path.unlink


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) if kind == "tokens" else kind for kind in KINDS],
)
def test_damage_to_any_file_of_an_entry_is_named_and_mended(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = KINDS[kind]
    expected = made(tmp_path)
    (entry,) = cache_entries.list_entries(tmp_path / kind)
    again = 0
    names = {path.name for path in entry.iterdir()} - {cache_entries.VERDICT}
    for name in sorted(names):
        for harm, damage in list(harms(entry / name)):
            if (entry / name).stat().st_size == 0 and harm != "gone":
                continue  # an empty file has no byte to lose
            damage()
            capsys.readouterr()
            assert torch.equal(made(tmp_path), expected), (name, harm)
            said = capsys.readouterr().err
            assert said.startswith(f"tuner: warning: {entry} is damaged (") and said.endswith(
                "; it is made anew\n"
            ), (name, harm, said)
            assert said.count("\n") == 1 and (
                name in said or "missing" in said or name == "sha256.json"
            ), (name, harm, said)
            again += 1
    assert again > 8
    assert made(tmp_path) is not None and capsys.readouterr().err == ""


def test_an_entry_is_read_through_once_in_a_process_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path)
    (entry,) = cache_entries.list_entries(tmp_path / "images")
    read: list[Path] = []
    real = cache_entries.file_sha256
    monkeypatch.setattr(cache_entries, "file_sha256", lambda path: read.append(path) or real(path))
    assert try_open(entry) is not None and read == []  # it was hashed while it was written
    cache_entries._verified_states.clear()  # as another process begins
    assert try_open(entry) is not None and read == []  # the verdict lies beside the files
    os.utime(entry / "pixels.bin", (1, 1))
    assert try_open(entry) is not None and len(read) == 3
    for how in ("gone", "old", "damaged"):
        cache_entries._verified_states.clear()
        read.clear()
        if how == "gone":
            (entry / cache_entries.VERDICT).unlink()
        elif how == "old":
            os.utime(entry / cache_entries.VERDICT, (1, 1))
        else:
            (entry / cache_entries.VERDICT).write_text("[[1")
        assert try_open(entry) is not None and len(read) == 3, how
        assert try_open(entry) is not None and len(read) == 3, how


# -- readers


HOLD = """
import sys
from pathlib import Path
from tuner.files.cache_entries import try_open
entry = try_open(Path(sys.argv[1]))
print(entry is not None, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def reader(entry: Path) -> "Iterator[subprocess.Popen[str]]":
    """Another process that reads an entry."""
    command = [sys.executable, "-c", HOLD, str(entry)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        try:
            yield process
        finally:
            process.kill()


def entry(parent: Path, name: str, size: int, age: float) -> Path:
    (parent / name).mkdir(parents=True)
    (parent / name / "0.bin").write_bytes(bytes(size))
    write_checksums(parent / name)
    os.utime(parent / name, (1e9 - age, 1e9 - age))
    return parent / name


def test_what_another_process_reads_stays_however_old_and_goes_when_that_is_killed(
    tmp_path: Path,
) -> None:
    old, middle, new = (
        entry(tmp_path, name, 1000, age)
        for name, age in (("old", 300), ("middle", 200), ("new", 100))
    )
    with reader(old) as process:
        os.utime(old, (1, 1))
        assert evict_until_fits(tmp_path, 0, byte_limit=2500)
        assert old.exists() and new.exists() and not middle.exists()
        assert not evict_until_fits(
            tmp_path, 1000, byte_limit=1500
        )  # everything that may go has gone
        assert old.exists() and not new.exists()
        make_space(tmp_path, 0)  # older than 60 days as well
        assert old.exists()
        process.kill()
        process.wait()
        assert evict_until_fits(tmp_path, 1000, byte_limit=1500)
    assert list(tmp_path.iterdir()) == []  # no locks either


def test_several_may_read_and_a_reader_finds_nothing_once_it_is_gone(tmp_path: Path) -> None:
    one = entry(tmp_path, "one", 10, 0)
    first, second = try_open(one), try_open(one)
    assert first is not None and second is not None and not evict_entry(one)
    del first
    assert not evict_entry(one)
    del second
    assert evict_entry(one) and try_open(one) is None and not one.exists()


def test_where_readers_leave_no_room_it_is_computed_on_the_fly_and_the_limit_holds(
    tmp_path: Path,
) -> None:
    def source(width: int) -> CachedSource:
        (tmp_path / "activations").mkdir(exist_ok=True)
        return CachedSource(
            UncachedSource(make_frozen_prefix(make_linear_chain(1, width)), CountingSource()),
            tmp_path / "activations",
            60_000,
        )

    index = torch.tensor([3, 1])
    first = source(1500)  # 48 kB a view
    first.take(index, 0)
    (read,) = [
        path
        for path in cache_entries.list_entries(tmp_path / "activations")
        if cache_entries.disk_usage(path) > 40_000
    ]
    second = source(1400)
    with reader(read):
        del first
        got, wanted = second.take(index, 0), second.uncached.take(index, 0)
        assert torch.equal(got.x, wanted.x) and torch.equal(got.y, wanted.y)  # type: ignore[arg-type]
        assert (
            not second.entry_folder(2, 0).exists()
            and read.exists()
            and cache_entries.disk_usage(tmp_path / "activations") <= 60_000
        )
        assert not list((tmp_path / "activations").glob(".*.tmp"))
    third = source(1400)
    third.take(index, 0)
    assert (
        third.entry_folder(2, 0).exists()
        and not read.exists()
        and cache_entries.disk_usage(tmp_path / "activations") <= 60_000
    )


def test_a_trial_that_ends_lets_go_of_what_it_read(tmp_path: Path) -> None:
    (tmp_path / "activations").mkdir()
    cached = CachedSource(
        UncachedSource(make_frozen_prefix(make_linear_chain(1)), CountingSource()),
        tmp_path / "activations",
        1e9,
    )
    cached.take(torch.tensor([0]), 0)
    place = cached.entry_folder(1, 0)
    assert not evict_entry(place)
    del cached
    assert evict_entry(place)


# -- litter


WRITE = """
import sys
from pathlib import Path
from tuner.files.atomic import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print(temporary, flush=True)
    sys.stdin.read()
"""


def test_a_file_that_is_being_written_is_not_swept_and_a_dead_writers_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path / "a")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        half = Path(process.stdout.readline().strip())
        remove_leftovers(tmp_path)
        assert half.exists()
        process.kill()
        process.wait()
    remove_leftovers(tmp_path)
    assert not half.exists() and list(tmp_path.iterdir()) == []
    with atomic_path(tmp_path / "b") as temporary:
        temporary.write_text("whole")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_locks_of_what_is_not_there_are_swept(tmp_path: Path) -> None:
    here, gone = "0" * 32, f"{'1' * 32}-0"
    one = entry(tmp_path, here, 10, 0)
    lock_path(one).touch()
    lock_path(tmp_path / gone).touch()
    (tmp_path / "poetry.lock").touch()  # not ours: no entry has such a name
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {here, f"{here}.lock", "poetry.lock"}
    shutil.rmtree(one)
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["poetry.lock"]

"""Files are whole or absent, whatever goes wrong while they are written or fetched."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import limit_file_size
from tests.helpers.http_server import serve_folder
from tuner.errors import DataError, StorageError
from tuner.files.atomic import atomic_path, disk_errors, file_lock, file_sha256
from tuner.files.downloads import download

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    assert file_sha256(tmp_path / "a") == HELLO


def test_a_file_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["a"]


def test_the_old_file_stays_when_it_does_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    says = "nowhere is no folder; make it, or write elsewhere"
    with pytest.raises(StorageError, match=says), atomic_path(tmp_path / "nowhere" / "a"):
        pass


def test_a_real_write_limit_is_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with (
        pytest.raises(StorageError) as error,
        limit_file_size(1000),
        atomic_path(path) as temporary,
    ):
        temporary.write_bytes(b"x" * 5000)
    assert (
        str(error.value)
        == f"disk full while writing {path} (File too large); free some space, such as by `tuner clean`, and run the same command"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "disk full while writing a (No space left on device); free some space, such as by `tuner clean`, and run the same command",
        ),
        (errno.EROFS, "cannot write a: Read-only file system"),
        (errno.EACCES, "cannot write a: Permission denied"),
    ],
)
def test_disk_errors_name_the_path(number: int, message: str) -> None:
    with pytest.raises(StorageError) as error, disk_errors(Path("a")):
        raise OSError(number, os.strerror(number))
    assert str(error.value) == message
    with (
        pytest.raises(IsADirectoryError),
        disk_errors(Path("a")),
    ):  # what it does not know stays what it is
        raise IsADirectoryError


def test_a_lock_excludes_and_is_freed_when_its_holder_is_killed(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from tuner.files.atomic import file_lock\nwith file_lock(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "lock")], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with file_lock(tmp_path / "lock", wait=False) as ours:
            assert not ours
        holder.kill()
    with file_lock(tmp_path / "lock", wait=False) as ours:
        assert ours


def test_a_download_arrives_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    with serve_folder(tmp_path) as address:
        download(f"{address}/a", tmp_path / "b", "weights", digest_prefix=HELLO[:8])
        download(f"{address}/a", tmp_path / "c", "data", "md5", hashlib.md5(b"hello").hexdigest())
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == b"hello"


@pytest.mark.parametrize(
    ("name", "begin", "message"),
    [
        (
            "none",
            "",
            "cannot download {url}: HTTP Error 404: File not found; fetch it elsewhere and place it at {path}",
        ),
        (
            "short",
            "",
            "cannot download {url}: the connection ended after 500,000 of 1,000,000 bytes; fetch it elsewhere and place it at {path}",
        ),
        (
            "other",
            "abcdef01",
            f"{{url}} has SHA-256 {HELLO}, expected abcdef01…; nothing was kept; "
            "fetch it elsewhere (its SHA-256 begins with abcdef01) and place it at {path}",
        ),
    ],
)
def test_a_failed_download_keeps_nothing(
    tmp_path: Path, name: str, begin: str, message: str
) -> None:
    (tmp_path / "other").write_bytes(b"hello")
    (tmp_path / "short").write_bytes(b"x" * 1_000_000)
    place = tmp_path / "place"
    place.mkdir()
    with serve_folder(tmp_path) as address, pytest.raises(DataError) as error:
        download(f"{address}/{name}", place / "a", "weights", digest_prefix=begin)
    assert str(error.value) == "weights: " + message.format(
        url=f"{address}/{name}", path=place / "a"
    )
    assert os.listdir(place) == []


def test_without_a_network_the_message_says_how_to_go_on(tmp_path: Path) -> None:
    with serve_folder(tmp_path) as address:
        pass  # nothing listens there any more
    with pytest.raises(DataError) as error:
        download(f"{address}/a-0123abcd.pth", tmp_path / "a", "weights", digest_prefix="0123abcd")
    for part in (
        f"cannot download {address}/a-0123abcd.pth",
        "refused",
        "SHA-256 begins with 0123abcd",
        f"place it at {tmp_path / 'a'}",
    ):
        assert part in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_download_to_a_full_disk_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"hello")

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tuner.files.downloads._save_body", full)
    with serve_folder(tmp_path) as address, pytest.raises(StorageError, match="disk full"):
        download(f"{address}/a", tmp_path / "b", "weights")
    assert os.listdir(tmp_path) == ["a"]

"""Which file systems a study's SQLite database may lie on."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult
from tuner.errors import StorageError
from tuner.files import mounts
from tuner.search import storage

Tuner = Callable[..., CommandResult]
HERE = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"


def mounted(folder: Path, kind: str) -> str:
    """What Linux tells of a machine with one more file system, mounted at `folder`."""
    place = str(folder).replace(" ", "\\040")
    return f"{HERE}\n41 27 0:52 / {place} rw,relatime shared:29 master:1 - {kind} server:/home rw\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    def mount(folder: Path, kind: str) -> None:
        (tmp_path / "mountinfo").write_text(mounted(folder, kind))
        monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")

    return mount


def test_23_sqlite_on_a_network_file_system_points_to_postgresql(
    tuner: Tuner, small: Path, machine: Callable[[Path, str], None]
) -> None:
    machine(small.parent, "nfs4")
    said = tuner("run", small)
    assert said.code == 4 and "network file system (nfs4)" in said.err
    assert "postgresql://" in said.err and "--studies" in said.err


NETWORK = [
    *("nfs", "cifs", "smb3", "lustre", "gpfs", "ceph", "fhgfs", "beegfs", "panfs", "9p", "vboxsf"),
    *("fuse.sshfs", "fuse.rclone", "fuse.juicefs", "fuse.glusterfs"),
]


def test_23_every_kind_of_file_system_is_refused_allowed_or_warned_of(
    tmp_path: Path, machine: Callable[[Path, str], None]
) -> None:
    folder = tmp_path / "my studies" / "digits"
    folder.mkdir(parents=True)

    def warnings(kind: str, place: Path = folder.parent) -> list[str]:
        machine(place, kind)
        told: list[str] = []
        storage.open_storage(None, folder, told.append)
        return told

    for kind in NETWORK:
        with pytest.raises(StorageError, match=rf"network file system \({kind}\)") as error:
            warnings(kind)
        assert error.value.code == 4
    for kind in ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "fuse.mergerfs"):
        assert warnings(kind) == []
    for kind in ("fuse.unheardof", "virtiofs"):  # a virtual machine's or a container's, mostly
        (warning,) = warnings(kind)
        assert f"({kind})" in warning and "several machines" in warning
    assert warnings("nfs", tmp_path / "elsewhere") == warnings("nfs", tmp_path / "my") == []


def test_this_machine_says_what_it_has_mounted() -> None:
    assert mounts.kind_of(Path("/proc/self")) == "proc"
    assert mounts.kind_of(Path("/sys")) == "sysfs"


def test_where_there_is_no_proc_the_command_mount_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are those of macOS 14 and FreeBSD 14."""
    said = (
        "/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)\n"
        f"//me@server/share on {tmp_path} (smbfs, nodev, nosuid, mounted by me)\n"
        "map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)\n"
        "server:/usr/home on /net (nfs)\n"
    )

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        assert command == ["mount"]
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "no")
    with monkeypatch.context() as patch:
        patch.setattr(mounts.subprocess, "run", run)
        kinds = [mounts.kind_of(place) for place in (tmp_path, Path("/bin"), Path("/net/a"))]
        assert kinds == ["smbfs", "apfs", "nfs"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mounts.kind_of(tmp_path) is None and mounts.networked(None) is None

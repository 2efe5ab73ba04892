"""The kind of file system on which a folder lies.

SQLite's locks and shared memory work on local file systems only.
"""

import re
import subprocess
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
# names as Linux, macOS and the BSDs have them; those of FUSE follow "fuse."
# fmt: off
NETWORK = frozenset({
    "9p", "acfs", "afpfs", "afs", "autofs_nfs", "beegfs", "ceph", "cifs", "coda", "cvfs",
    "dvs", "exafs", "fhgfs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "mmfs", "ncpfs",
    "nfs", "nfs3", "nfs4", "ocfs2", "orangefs", "osxfs", "panfs", "prl_fs", "pvfs2", "smb",
    "smb2", "smb3", "smbfs", "v9fs", "vboxsf", "vmhgfs", "webdav", "wekafs",
})
NETWORK_FUSE = frozenset({
    "afs", "beegfs", "blobfuse", "blobfuse2", "ceph", "ceph-fuse", "cephfs", "curlftpfs",
    "davfs", "davfs2", "gcsfuse", "geesefs", "glusterfs", "goofys", "grpcfuse", "hdfs",
    "juicefs", "lizardfs", "mfs", "moosefs", "mount-s3", "mountpoint-s3", "osxfs",
    "quobyte", "rclone", "s3fs", "seaweedfs", "sshfs", "vmhgfs-fuse", "weed",
})
LOCAL_FUSE = frozenset({
    "bindfs", "encfs", "exfat", "ext2", "fuse-overlayfs", "gocryptfs", "lxcfs", "mergerfs",
    "ntfs", "ntfs-3g", "securefs", "unionfs", "unionfs-fuse",
})
# fmt: on
LISTED = re.compile(r"^.* on (?P<place>/.*) \((?P<kind>[^,)]+)", re.MULTILINE)


def kind_of(folder: Path) -> str | None:
    """The name of the file system that holds `folder`; None where the system does not say."""
    folder = folder.resolve()
    places = _mounted()
    for place in (folder, *folder.parents):
        if place in places:
            return places[place]
    return None


def networked(kind: str | None) -> bool | None:
    """Whether machines share a file system of this name.

    None where its name does not show it.
    """
    if kind is None:
        return None
    family, _, name = kind.partition(".")
    if family in ("fuse", "macfuse", "osxfuse"):
        return True if name in NETWORK_FUSE else False if name in LOCAL_FUSE else None
    return None if kind == "virtiofs" else kind in NETWORK


def _mounted() -> dict[Path, str]:
    """Mount point -> the kind of file system.

    Of several file systems at one path it has the last, which hides the others.
    """
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return _listed()
    kinds = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        place = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        kinds[Path(place)] = after.split()[0]
    return kinds


def _listed() -> dict[Path, str]:
    """The same from the command `mount`, where there is no /proc: macOS, the BSDs."""
    try:
        done = subprocess.run(
            ["mount"],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {Path(match["place"]): match["kind"] for match in LISTED.finditer(done.stdout)}

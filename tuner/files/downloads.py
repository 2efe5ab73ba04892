"""Files from the net: whole and of the stated digest, or not at all."""

import contextlib
import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from tuner.errors import DataError
from tuner.files.atomic import atomic_path

OFFLINE: ContextVar[bool] = ContextVar(
    "OFFLINE", default=False
)  # set where nothing may be downloaded
PATIENCE = 30.0  # seconds without a byte after which a download is given up


@contextlib.contextmanager
def offline(on: bool) -> Iterator[None]:
    """Nothing is downloaded within, where `on`."""
    token = OFFLINE.set(on)
    try:
        yield
    finally:
        OFFLINE.reset(token)


def download(url: str, path: Path, what: str, algorithm: str = "sha256", begin: str = "") -> None:
    """The file behind `url`, whole at `path` or not at all; its digest must begin with `begin`.

    Raises DataError that says how to place the file by hand, StorageError when it cannot be written.
    """
    if OFFLINE.get():
        raise DataError(f"{what}: {path} is not there yet; `tuner run` downloads it from {url}")
    name = algorithm.upper().replace("SHA256", "SHA-256")
    known = f" (its {name} begins with {begin})" if begin else ""
    by_hand = f"fetch it elsewhere{known} and place it at {path}"
    request = urllib.request.Request(url, headers={"User-Agent": "tuner"})
    try:
        with (
            urllib.request.urlopen(request, timeout=PATIENCE) as answer,
            atomic_path(path, what="download") as temporary,
        ):
            digest = _copy(answer, temporary, algorithm)
            if not digest.startswith(begin):
                raise DataError(
                    f"{what}: {url} has {name} {digest}, expected {begin}…; nothing was kept; {by_hand}"
                )
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise DataError(f"{what}: cannot download {url}: {error}; {by_hand}") from None
    except (
        OSError,
        http.client.HTTPException,
    ) as error:  # OSError covers urllib's URLError and time-outs
        raise DataError(f"{what}: cannot download {url}: {error}; {by_hand}") from None


def _copy(answer: http.client.HTTPResponse, path: Path, algorithm: str) -> str:
    """Writes the answer's body and returns its digest. Raises OSError when the connection ended early."""
    seen, size = hashlib.new(algorithm, usedforsecurity=False), 0
    with open(path, "wb") as file:
        while chunk := answer.read(1 << 20):
            seen.update(chunk)
            file.write(chunk)
            size += len(chunk)
    promised = answer.headers.get("Content-Length")
    if promised is not None and size != int(promised):
        raise ConnectionError(f"the connection ended after {size:,} of {int(promised):,} bytes")
    return seen.hexdigest()

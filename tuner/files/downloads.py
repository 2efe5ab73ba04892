"""Downloads: a file is whole and has the expected digest, or does not exist."""

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

DOWNLOADS_FORBIDDEN: ContextVar[bool] = ContextVar(
    "OFFLINE", default=False
)  # set where nothing may be downloaded
TIMEOUT = 30.0  # seconds without a byte after which a download is given up


@contextlib.contextmanager
def forbid_downloads(on: bool) -> Iterator[None]:
    """Forbids downloads inside the block, if `on`."""
    token = DOWNLOADS_FORBIDDEN.set(on)
    try:
        yield
    finally:
        DOWNLOADS_FORBIDDEN.reset(token)


def download(
    url: str, path: Path, label: str, algorithm: str = "sha256", digest_prefix: str = ""
) -> None:
    """Downloads `url` to `path`, whole or not at all; its digest must begin with `digest_prefix`.

    Raises DataError, which says how to place the file by hand, and StorageError when it cannot be
    written.
    """
    if DOWNLOADS_FORBIDDEN.get():
        raise DataError(f"{label}: {path} is not there yet; `tuner run` downloads it from {url}")
    name = algorithm.upper().replace("SHA256", "SHA-256")
    known = f" (its {name} begins with {digest_prefix})" if digest_prefix else ""
    by_hand = f"fetch it elsewhere{known} and place it at {path}"
    request = urllib.request.Request(url, headers={"User-Agent": "tuner"})
    try:
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT) as answer,
            atomic_path(path, crash_prefix="download") as temporary,
        ):
            digest = _save_body(answer, temporary, algorithm)
            if not digest.startswith(digest_prefix):
                raise DataError(
                    f"{label}: {url} has {name} {digest}, expected {digest_prefix}…; nothing was "
                    f"kept; {by_hand}"
                )
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise DataError(f"{label}: cannot download {url}: {error}; {by_hand}") from None
    except (
        OSError,
        http.client.HTTPException,
    ) as error:  # OSError covers urllib's URLError and time-outs
        raise DataError(f"{label}: cannot download {url}: {error}; {by_hand}") from None


def _save_body(answer: http.client.HTTPResponse, path: Path, algorithm: str) -> str:
    """Writes the answer's body and returns its digest.

    Raises OSError when the connection ended early.
    """
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

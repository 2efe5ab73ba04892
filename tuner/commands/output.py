"""stdout and stderr that may go away.

A search outlives the terminal, the `tee` or the log collector to which it prints.
"""

import os
import sys
from typing import Any, TextIO


class LastingStream:
    """A text stream that continues to /dev/null.

    It does so when nobody reads the stream any more, or when it cannot be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.redirect()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.redirect()

    def redirect(self) -> None:
        """Also for what the stream still has in its buffer, which it would try to write again and
        again.
        """
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_streams() -> None:
    """Makes stdout and stderr of this process lasting."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))

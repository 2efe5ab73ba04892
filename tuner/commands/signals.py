"""Ctrl-C and SIGTERM: the first asks for an orderly stop, the second, or ten seconds after a SIGTERM, ends the work now."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

GRACE = 8.0  # seconds that a SIGTERM leaves to the running epoch


class Stop:
    """`signal` is what arrived, if anything; `now` says that there is no more time."""

    def __init__(self, abrupt: bool = False) -> None:
        self.abrupt = abrupt
        self.signal: int | None = None
        self.count = 0
        self.since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.signal = self.signal or number
        if self.count == 1:
            self.since = time.monotonic()
        elif self.abrupt:
            raise KeyboardInterrupt  # training runs in this very process, so nothing else would end it

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def now(self) -> bool:
        late = self.signal == signal.SIGTERM and time.monotonic() - self.since > GRACE
        return self.count > 1 or late


@contextlib.contextmanager
def stoppable(*, abrupt: bool = False) -> Iterator[Stop]:
    """Handlers that only set a flag, for the length of the block."""
    stop = Stop(abrupt)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: the first asks for an orderly stop, the second stops now.

Nobody repeats a SIGTERM or a SIGHUP, so after one of these a time of grace replaces the second.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """Which signal arrived, and whether there is still time.

    `signal`: the number of the first signal, or None. `is_now`: no time is left. `grace`: seconds.
    """

    def __init__(self, grace: float, interrupts_at_once: bool = False) -> None:
        self.grace, self.interrupts_at_once = grace, interrupts_at_once
        self.signal: int | None = None
        self.signal_count = 0
        self.first_signal_at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal_count += 1
        self.signal = self.signal or number
        if self.signal_count == 1:
            self.first_signal_at = time.monotonic()
        elif self.interrupts_at_once:
            # training runs in this very process, so nothing else would end it
            raise KeyboardInterrupt

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def patient(self) -> bool:
        """A person who presses Ctrl-C waits as long as it takes."""
        return self.signal == signal.SIGINT

    @property
    def is_now(self) -> bool:
        late = (
            bool(self) and not self.patient and time.monotonic() - self.first_signal_at > self.grace
        )
        return self.signal_count > 1 or late

    @property
    def way_out(self) -> str:
        """What ends the work sooner, or when it ends."""
        if self.patient:
            return "press Ctrl-C again to stop now"
        return f"it may take {self.grace:g} s (search.grace)"


@contextlib.contextmanager
def handle_signals(grace: float, *, interrupts_at_once: bool = False) -> Iterator[StopSignal]:
    """Installs, for the length of the block, handlers that only set a flag.

    A SIGHUP that `nohup` has made ignored stays ignored. Outside the main thread, where Python lets
    nobody install handlers, nothing is installed.
    """
    stop = StopSignal(grace, interrupts_at_once)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: signal.signal(number, stop)
        for number in HEARD
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Which errors of a PostgreSQL server pass by themselves, and how calls are repeated until then."""

import time
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy

from tuner.errors import StorageError

T = TypeVar("T")
FIRST_WAIT = 0.5  # seconds; every further wait is twice as long
LONGEST_WAIT = 30.0  # seconds
TOTAL_WAIT = 600.0  # seconds of all waits together
WARNING_SECONDS = 60  # seconds between two warnings that the server does not answer
# deadlocks, shutdown, starting up, idle too long
TRANSIENT_SQLSTATES = {"40001", "40P01", "53300", "57P01", "57P02", "57P03", "57P05", "25P03"}
PERMANENT_ERRORS = (
    "authentication failed",
    "does not exist",
    "no password supplied",
    "pg_hba.conf",
    "permission denied",
    "not permitted",
)


class ConnectionLost(Exception):
    """The connection broke in the middle of a call. Whether the call was carried out is unknown."""


def raise_connection_lost(context: sqlalchemy.engine.ExceptionContext) -> None:
    """Turn the driver's error into ConnectionLost where the error passes by itself.

    This is a listener for SQLAlchemy's event `handle_error`. An error that does not pass, such as
    a wrong password, stays as it is.
    """
    error = context.original_exception
    while_connecting = context.connection is None and isinstance(
        error, context.dialect.loaded_dbapi.OperationalError
    )
    permanent = while_connecting and any(text in str(error) for text in PERMANENT_ERRORS)
    if context.is_pre_ping or permanent:
        return
    transient = getattr(error, "sqlstate", None) in TRANSIENT_SQLSTATES
    if context.is_disconnect or while_connecting or transient:
        raise ConnectionLost(one_line_reason(error)) from None


def one_line_reason(error: BaseException) -> str:
    """Return the driver's message on one line: it has a line for each address of the server."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


class RetryPolicy:
    """Repeats calls until the server answers, for ten minutes, and warns meanwhile.

    Args:
        display_url: The database's URL without its password, for messages.
        warn: Shows a warning to the user.
        should_give_up: Whether no further try is made, because the user stops the search.
    """

    def __init__(
        self, display_url: str, warn: Callable[[str], None], should_give_up: Callable[[], bool]
    ) -> None:
        self.display_url = display_url
        self.warn = warn
        self.should_give_up = should_give_up
        self.last_warning = float("-inf")

    def run(self, call: Callable[[bool], T]) -> T:
        """Make the call, and repeat it while the connection to the server is lost.

        Args:
            call: Its argument says whether an earlier try may have been carried out.

        Raises:
            StorageError: The server did not answer for ten minutes, or the user stops the search.
        """
        try:
            return call(False)
        except ConnectionLost as error:
            cause = error
        lost_at, wait = time.monotonic(), FIRST_WAIT
        while True:
            if self.should_give_up() or time.monotonic() - lost_at + wait > TOTAL_WAIT:
                raise StorageError(
                    f"storage: {self.display_url} does not answer ({cause}); finished trials are "
                    "kept: see to it and run the same command"
                ) from None
            self._warn_of_loss(cause)
            self._sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
            try:
                result = call(True)
            except ConnectionLost as error:
                cause = error
            else:
                if self.last_warning >= lost_at:
                    self.warn("the database answers again")
                return result

    def _warn_of_loss(self, cause: ConnectionLost) -> None:
        if time.monotonic() - self.last_warning > WARNING_SECONDS:
            minutes = f"{TOTAL_WAIT / 60:g} minutes"
            self.warn(f"the database does not answer ({cause}); trying again for {minutes}")
            self.last_warning = time.monotonic()

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.should_give_up():
            time.sleep(0.1)

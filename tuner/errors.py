"""What can go wrong, each kind with the exit code that the command line ends with.

TunerError                  1   a bug in tuner
├── SpaceError              2   the file or the command line
├── DataError               3   data or weights
├── StorageError            4   disk, database, permission, device
├── NoUsableTrial           5   the search ended without a trial to crown
├── ExportMismatch          1   an export that disagrees with its model
└── Interrupted   129/130/143   stopped by the user; the same command continues
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

# why test-time flips are for some tasks alone
NO_MEAN_OF_OUTPUTS = (
    "only outputs that are numbers for the same classes or pixels have a mean; the boxes of an "
    "image and its mirror image would have to be matched first, and a text has no mirror image"
)
MAX_LISTED = 10  # problems that a message lists before it only counts them


class TunerError(Exception):
    """One or more problems, a line each, worded for the person who can mend them."""

    code = 1

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems: Sequence[str] = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class SpaceError(TunerError):
    code = 2


class DataError(TunerError):
    code = 3


class StorageError(TunerError):
    code = 4


class NoUsableTrial(TunerError):
    code = 5


class ExportMismatch(TunerError):
    code = 1


class Interrupted(TunerError):
    """Raised once everything is at rest; `signal` is SIGINT (2), SIGTERM (15) or SIGHUP (1)."""

    def __init__(self, signal: int, *problems: str) -> None:
        super().__init__(*problems)
        self.code = 128 + signal


def nearest_hint(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest allowed word, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def suggest_names(word: object, allowed: Iterable[str]) -> str:
    """The closest allowed word, then all of them."""
    words = list(allowed)
    close = nearest_hint(word, words) if isinstance(word, str) else ""
    return f"{close} (allowed: {', '.join(words)})"


def nearest_path_hint(path: Path, *, folders_only: bool = False) -> str:
    """`; did you mean 'x'?` for the closest name in the folder of a missing path, or nothing."""
    if not path.parent.is_dir():
        return ""
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir() or not folders_only]
    return nearest_hint(path.name, siblings)


def count_words(count: int, one: str, several: str) -> str:
    """`1 image is` or `2 images are`: a count before the words of one or of several."""
    return f"{count:,} {one if count == 1 else several}"


def limit_listing(items: Sequence[str], limit: int = MAX_LISTED) -> list[str]:
    """The first `limit` items, and after them `… and N more` if there are more."""
    more = [f"… and {len(items) - limit} more"] if len(items) > limit else []
    return [*items[:limit], *more]

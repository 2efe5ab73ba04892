"""The tables of a task's report as files."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def encode_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A table as CSV in UTF-8; lone surrogates become question marks."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode(errors="replace")

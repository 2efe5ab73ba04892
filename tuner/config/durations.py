"""Durations as a space file writes them."""

import re

SECONDS_PER_UNIT = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}  # in seconds
DURATION_PATTERN = re.compile(
    "".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in SECONDS_PER_UNIT)
)
MAX_DURATION_DAYS = 10_000  # days


def parse_duration(text: str) -> float:
    """'90s', '10m', '1h30m', '1.5h', '2d' in seconds; ValueError on anything else."""
    match = DURATION_PATTERN.fullmatch(text)
    if not text or match is None:
        raise ValueError("write a duration such as 90s, 10m, 1h30m, 1.5h or 2d")
    total = sum(
        float(part or 0) * size
        for part, size in zip(match.groups(), SECONDS_PER_UNIT.values(), strict=True)
    )
    if not 0 < total <= MAX_DURATION_DAYS * SECONDS_PER_UNIT["d"]:
        raise ValueError(f"a duration must be above 0 and at most {MAX_DURATION_DAYS:,}d")
    return total


def check_duration(text: str | None) -> str | None:
    """The text as it is; ValueError where it is neither None nor a duration."""
    if text is not None:
        parse_duration(text)
    return text

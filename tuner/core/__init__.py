"""The vocabulary that tasks, models, data sources and export formats are written in."""

from tuner.core.types import (
    Batch,
    Data,
    Source,
    Staged,
    Task,
    Told,
    apart,
    cut,
    digest_of,
)

__all__ = ["Batch", "Data", "Source", "Staged", "Task", "Told", "apart", "cut", "digest_of"]

"""The vocabulary that tasks, models, data sources and export formats are written in."""

from tuner.core.module_digests import module_digest
from tuner.core.types import (
    Batch,
    Dataset,
    Prediction,
    Source,
    StagedModel,
    Task,
    relative_difference,
    split_sequential,
)

__all__ = [
    "Batch",
    "Dataset",
    "Prediction",
    "Source",
    "StagedModel",
    "Task",
    "module_digest",
    "relative_difference",
    "split_sequential",
]

"""What `tuner plan` has measured, kept for the searches that follow."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuner.commands.finishing_times import cost_key
from tuner.config.space import Space
from tuner.files.atomic import write_note
from tuner.messages import DatasetReport, DepthCost, ModelSurvey, TrainingProfile


class PlanNotes:
    """The file with the profiles of the models of such a search on this machine."""

    def __init__(self, home: Path, space: Space, survey: ModelSurvey, facts: DatasetReport) -> None:
        self.path = home / "costs" / f"{cost_key(space, survey, facts)}.plan.json"
        self.split_sizes = facts.split_sizes

    def read(self) -> dict[str, TrainingProfile]:
        """The profiles by the model's name; none where nothing fits these data."""
        try:
            content = json.loads(self.path.read_text())
            return {
                name: _profile(values)
                for name, values in content.items()
                if values["split_sizes"] == self.split_sizes
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def write(self, profiles: Mapping[str, TrainingProfile]) -> None:
        """Keeps the profiles. Raises StorageError."""
        write_note(self.path, {name: asdict(profile) for name, profile in profiles.items()})


def _profile(values: dict[str, Any]) -> TrainingProfile:
    depths = tuple(DepthCost(**row) for row in values["depths"])
    return TrainingProfile(**{**values, "depths": depths})

"""How long a command takes beside its trainings after a search: tests, export and report.

It is remembered for each machine, model and set of formats, in the home folder, for the next search
with `search.time`.
"""

import hashlib
import json
import math
import platform
import time
from pathlib import Path

from tuner.config.space import Space
from tuner.files.atomic import write_note
from tuner.messages import DatasetReport, ModelSurvey
from tuner.search.time_limit import TimeLimit

# Where nothing is known, the finishing is taken to last as long as the command took to begin: both
# load the libraries, read the data and build the model. Seconds.
SHORTEST_GUESS, LONGEST_GUESS = 5.0, 60.0


def cost_key(space: Space, survey: ModelSurvey, facts: DatasetReport) -> str:
    """The name under which the costs of such a search on this machine are kept."""
    names = {
        "machine": [platform.node(), platform.machine(), survey.gpu_count],
        "models": sorted(survey.max_depths),
        "formats": sorted(space.settings.export),
        "compare": space.settings.search.compare,
        "input": facts.input_description,
        "test": math.ceil(math.log2(1 + facts.split_sizes["test"])),
    }
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:32]


class FinishingTimes:
    """The file with the seconds that the finishing of such a search took last."""

    def __init__(self, home: Path, space: Space, survey: ModelSurvey, facts: DatasetReport) -> None:
        key = cost_key(space, survey, facts)
        self.path = home / "costs" / f"{key}.finishing.json"

    def read(self, seconds_to_begin: float) -> float:
        """The seconds to reserve; a guess by those that the command took to begin."""
        try:
            return float(json.loads(self.path.read_text())["seconds"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return min(max(seconds_to_begin, SHORTEST_GUESS), LONGEST_GUESS)

    def write(self, seconds: float) -> None:
        """Keeps what it took this time. Raises StorageError."""
        write_note(self.path, {"seconds": round(max(0.0, seconds), 3)})


class FinishingClock:
    """Measures what follows a search whose time is limited.

    `expected`: the seconds of the trainings since then, as the trials foretold them. `exported`:
    whether an export was made; otherwise there is nothing to learn from.
    """

    def __init__(self, times: FinishingTimes, limit: TimeLimit) -> None:
        self.times, self.limit = times, limit
        self.began = time.monotonic()
        self.expected, self.exported = 0.0, False

    def has_time_for(self, seconds: float) -> bool:
        """Whether so many seconds of training fit before the finishing."""
        return self.limit.seconds_left() > seconds + self.limit.finishing

    def end(self) -> None:
        """Keeps how long the finishing took. Raises StorageError."""
        if self.exported:
            self.times.write(time.monotonic() - self.began - self.expected)

"""How long a command takes beside its trainings after a search: tests, export and report.

It is remembered for each machine, model and set of formats, in the home folder, for `tuner plan`
and for the next search with `search.time`.
"""

import contextlib
import hashlib
import json
import math
import platform
import time
from pathlib import Path

from tuner.config.space import Space
from tuner.errors import StorageError
from tuner.files.atomic import write_note
from tuner.messages import DatasetReport, ModelSurvey
from tuner.search.time_limit import TimeLimit

# Where nothing is known, the finishing is guessed from the seconds that the command took to begin:
# both load libraries, read the data and build the model. The shares are those of a small network
# (benchmarks/README.md, "What `tuner plan` foretells").
BASE_SHARE = 0.6  # test, safetensors and report
COMPARED_SHARE = 0.5  # the default recipe's test, and the comparison
FORMAT_SHARES = {
    "safetensors": 0.0,
    "torch_export": 0.3,
    "onnx": 0.7,
    "onnx_fp16": 0.7,
    "onnx_int8": 0.6,
    "openvino": 0.7,
}
OTHER_FORMAT_SHARE = 0.5
SHORTEST_GUESS, LONGEST_GUESS = 3.0, 120.0  # seconds


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
        self.share = BASE_SHARE + sum(
            FORMAT_SHARES.get(name, OTHER_FORMAT_SHARE) for name in space.settings.export
        )
        if space.settings.search.compare == "default":
            self.share += COMPARED_SHARE

    def read(self, seconds_to_begin: float) -> float:
        """The seconds to reserve; a guess by those that the command took to begin."""
        try:
            return float(json.loads(self.path.read_text())["seconds"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return min(max(self.share * seconds_to_begin, SHORTEST_GUESS), LONGEST_GUESS)

    def write(self, seconds: float) -> None:
        """Keeps what it took this time. Raises StorageError."""
        write_note(self.path, {"seconds": round(max(0.0, seconds), 3)})


class FinishingClock:
    """Measures what follows a search.

    `limit`: that of `search.time`, if there is one. `expected`: the seconds of the trainings since
    then, as the trials foretold them. `exported`: whether an export was made; otherwise there is
    nothing to learn from.
    """

    def __init__(self, times: FinishingTimes, limit: TimeLimit | None) -> None:
        self.times, self.limit = times, limit
        self.began = time.monotonic()
        self.expected, self.exported = 0.0, False

    def has_time_for(self, seconds: float) -> bool:
        """Whether so many seconds of training fit before the finishing."""
        return self.limit is None or self.limit.seconds_left() > seconds + self.limit.finishing

    def end(self) -> None:
        """Keeps how long the finishing took. Without space for it, the next search has a guess."""
        if self.exported:
            with contextlib.suppress(StorageError):
                self.times.write(time.monotonic() - self.began - self.expected)

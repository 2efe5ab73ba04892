"""The winner beside the default recipe on the same test examples.

The interval of the difference is that of a paired bootstrap (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13): test examples are drawn with replacement, both models are
scored on each draw, and the interval has the middle 95 % of the differences. Paired, because both
models find the same examples hard.
"""

import json
from dataclasses import dataclass

from safetensors.torch import save

from tuner.core.example_results import ExampleResults

DRAWS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class TestedRun:
    """How one model did on the test examples: its scores, and what each of `count` examples adds
    to them.

    `results` is empty where the task keeps none.
    """

    __test__ = False  # no test of pytest's

    run_digest: str
    data_digest: str
    scores: dict[str, float]
    count: int
    results: ExampleResults

    def to_bytes(self) -> bytes:
        """A safetensors file with the results, and the rest as its metadata."""
        metadata = {
            "run_digest": self.run_digest,
            "data_digest": self.data_digest,
            "scores": json.dumps(self.scores),
            "count": str(self.count),
        }
        return save({k: v.contiguous() for k, v in self.results.items()}, metadata)

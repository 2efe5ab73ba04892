"""Problems of a space file that its models show, with the lines of the file."""

from collections.abc import Iterator
from typing import Any

from tuner.config.space import Range, Space
from tuner.config.yaml_document import Document


def find_depth_problems(space: Space, model: str, depth: int) -> Iterator[str]:
    """The freeze depths of the file that the model does not have."""
    path = ("recipe", "freeze_depth")
    searched = next((d.domain for d in space.dimensions if d.path == path), None)
    deepest = int(space.highest(path, model))
    if deepest > depth:
        key = (*path, "high") if isinstance(searched, Range) else path
        yield space.document.format_problem(key, f"{deepest}, but {model} allows 0..{depth}")


def with_line_numbers(document: Document, problems: Any) -> list[str]:
    """Problems that begin with a key, such as `model.weights: …`, with the key's line."""
    located = []
    for problem in problems:
        key = tuple(problem.partition(":")[0].split("."))
        known = key in document.lines or key[:1] in document.lines
        located.append(f"{document.location(key)}: {problem}" if known else problem)
    return located

"""docs/reference.md is current: it is what docs/reference.py writes, and it names every key and every command."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tuner.config.json_schema import space_schema

SCRIPT = Path(__file__).parents[2] / "docs" / "reference.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(section: Mapping[str, Any]) -> Iterator[str]:
    """The keys that a section of the schema has in any of its forms."""
    for form in (section, *section.get("anyOf", ())):
        yield from form.get("properties", {})


def test_the_reference_is_what_the_schema_says(generator: ModuleType) -> None:
    written = SCRIPT.with_suffix(".md").read_text()
    assert written == generator.reference(), "run `python docs/reference.py`"
    for section, content in space_schema()["properties"].items():
        assert f"## {section}" in written or f"| `{section}` |" in written
        for key in set(keys(content)) - {"name", "choices", "when"}:
            assert f"| `{section}.{key}` |" in written


def test_every_key_has_a_meaning() -> None:
    rows = [
        line
        for line in SCRIPT.with_suffix(".md").read_text().splitlines()
        if line.startswith(("| `task.", "| `data.", "| `model.", "| `recipe.", "| `search."))
    ]
    assert len(rows) > 60 and [row for row in rows if row.endswith("|  |")] == []

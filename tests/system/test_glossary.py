"""docs/glossary.md names files and symbols that exist, and each term once."""

import ast
import re
from pathlib import Path

import tuner

PACKAGE = Path(tuner.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "glossary.md").read_text()
PLACE = re.compile(r"`([a-z_/*]+\.py)`(?:: ((?:`[A-Za-z_]+`(?:, )?)+))?")


def defined(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_every_file_and_symbol_that_the_glossary_names_exists() -> None:
    missing = []
    for file, symbols in PLACE.findall(PAGE):
        if "*" in file:
            continue
        path = PACKAGE / file
        known = defined(path) if path.is_file() else set()
        missing += [file] * (not path.is_file())
        missing += [
            f"{file}: {name}" for name in re.findall(r"`(\w+)`", symbols) if name not in known
        ]
    assert missing == []


def test_every_term_has_one_meaning() -> None:
    rows = [line.split(" | ")[0].strip("| ") for line in PAGE.splitlines() if line.startswith("| ")]
    terms = [term.strip() for row in rows for term in row.split(", ") if row not in ("term", "not")]
    assert len(terms) == len(set(terms))

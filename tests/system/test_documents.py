"""The documents for people: links and paths lead somewhere, a paragraph is one line."""

import itertools
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for folder in (
        ".",
        "docs",
        "docs/tasks",
        "benchmarks",
        "examples/slurm",
        "examples/kubernetes",
        "examples/plugins",
    )
    for path in sorted((ROOT / folder).glob("*.md"))
    if path.name != "CHANGELOG.md"
]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def test_the_script_makes_every_picture_and_each_is_shown() -> None:
    docs = ROOT / "docs"
    script = runpy.run_path(str(docs / "pictures.py"), run_name="pictures")
    there = {path.name for kind in ("*.png", "*.svg") for path in docs.glob(kind)}
    assert set(script["PICTURES"]) == there
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert [
        name for name in sorted(there) if not re.search(rf"[(/\"]{re.escape(name)}", text)
    ] == []


def prose(path: Path) -> Iterator[str]:
    """The lines outside code blocks."""
    inside = False
    for line in path.read_text().splitlines():
        inside ^= line.startswith("```")
        yield "" if inside or line.startswith(("```", "    ")) else line


def anchors(path: Path) -> set[str]:
    """The fragments that lead to a document's headings."""
    headings = [line.lstrip("#").strip().lower() for line in prose(path) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@each_document
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", "\n".join(prose(path))):
        name, _, fragment = target.partition("#")
        document = (path.parent / name).resolve() if name else path
        assert document.exists(), target
        assert not fragment or fragment in anchors(document), target


@each_document
def test_a_paragraph_is_one_line(path: Path) -> None:
    """Lines of a fixed width make every change of a paragraph a change of all its lines."""
    starts = re.compile(r"\s*([-*>|#<!]|\d+\.|$)")
    lines = list(prose(path))
    for before, line in itertools.pairwise(lines):
        if before.strip() and not before.startswith(("|", "#", "<")):
            assert starts.match(line), f"joins the line before it: {line}"


@pytest.mark.parametrize(
    "name", ["docs/design.md", "docs/upgrading.md", "docs/scale.md", "CONTRIBUTING.md"]
)
def test_every_module_named_is_there(name: str) -> None:
    """Modules go as `tuner/search/storage.py`, or below tuner/ as `search/storage.py` and `search/storage`."""
    packages = "|".join(path.parent.name for path in (ROOT / "tuner").glob("*/__init__.py"))
    named = re.findall(
        rf"`((?:tests/[\w/]+|scripts/\w+|(?:tuner/)?(?:{packages})/\w\w+)(?:\.py)?)/?`",
        (ROOT / name).read_text(),
    )
    assert named
    for path in named:
        places = [
            folder / f"{path}{end}" for folder in (ROOT, ROOT / "tuner") for end in ("", ".py")
        ]
        assert any(place.exists() for place in places), path

"""The site of the documents, the pages about tasks and questions, and the Chinese README."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuner.config import parsing, yaml_document

ROOT = Path(__file__).parents[2]
SITE = ROOT / ".ci" / "site"
NAMES = ("faq", "freezing", "caching", "choosing", "searching", "machines")
PAGES = [*(ROOT / "docs" / f"{name}.md" for name in NAMES), *sorted(ROOT.glob("docs/tasks/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLE = """
task: {name: classification}
data: {name: folder, path: photos}
model: {name: resnet18}
"""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def configuration() -> dict[str, Any]:
    """mkdocs.yml without the object of Python's that it names."""
    text = (SITE / "mkdocs.yml").read_text()
    read: dict[str, Any] = yaml.safe_load(re.sub(r"!!python/\S+", "", text))
    return read


def in_navigation(entries: Any) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
        return
    for entry in entries.values() if isinstance(entries, dict) else entries:
        yield from in_navigation(entry)


def test_every_document_is_in_the_navigation_once() -> None:
    named = list(in_navigation(configuration()["nav"]))
    documents = {str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")}
    assert documents | {"README.md", "README.zh.md", "benchmarks/README.md"} <= set(named)
    assert len(named) == len(set(named))
    assert all((SITE / "pages" / name).is_file() for name in named)


@each_page
def test_every_measured_figure_stands_in_the_benchmarks(page: Path) -> None:
    """In prose and tables; what stands between backticks is a value and no measurement."""
    sources = (ROOT / "benchmarks/README.md").read_text() + (ROOT / "docs/scale.md").read_text()
    known = set(re.findall(r"\d+\.\d+", sources))
    prose = re.sub(r"`[^`]*`", "", BLOCK.sub("", page.read_text()))
    assert set(re.findall(r"\d+\.\d+", prose)) <= known


@each_page
def test_the_space_files_shown_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones as they are, parts of one in an example."""
    monkeypatch.setenv("TUNER_DB_PASSWORD", "x")
    for language, block in BLOCK.findall(page.read_text()):
        if language == "yaml":
            whole = {**yaml.safe_load(EXAMPLE), **yaml.safe_load(block)}
            text = block if block.startswith("task:") else yaml.safe_dump(whole)
            parsing.parse_space(yaml_document.parse_document(text, page.name))


@each_page
def test_the_commands_shown_have_the_options(page: Path) -> None:
    reference = (ROOT / "docs/reference.md").read_text()
    usages = dict(re.findall(r"^### tuner (\w+)\n(.*?)(?=^###|\Z)", reference, re.DOTALL | re.M))
    for command, rest in re.findall(r"\btuner ([a-z]+)\b([^`\n#]*)(?=[`\n#])", code(page)):
        for option in re.findall(r"--[a-z-]+", rest):
            assert f"`{option}`" in usages[command], (command, option)
        assert command in usages


def code(page: Path) -> str:
    """What a reader may type: the blocks of commands, and the spans in the text, one a line."""
    text = page.read_text()
    blocks = [block for language, block in BLOCK.findall(text) if language == "bash"]
    spans = re.findall(r"`(tuner [^`]*)`", BLOCK.sub("", text))
    return "\n".join([*blocks, *spans, ""])


def without_comments(text: str) -> set[str]:
    lines = (re.sub(r"\s*#.*", "", line) for line in text.splitlines())
    return {line for line in lines if line.strip()}


def test_what_the_chinese_readme_shows_is_in_the_english_one() -> None:
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    assert "](README.zh.md)" in english
    shown = [
        without_comments("\n".join(b for _, b in BLOCK.findall(text)))
        for text in (english, chinese)
    ]
    assert shown[1] - shown[0] == set()
    # and every command of users; only that which runs the tests is left out
    commands = [
        {line for lang, b in BLOCK.findall(text) if lang == "bash" for line in without_comments(b)}
        for text in (english, chinese)
    ]
    assert {line for line in commands[0] - commands[1] if "pytest" not in line} == set()
    figures = [set(re.findall(r"\d[\d.,]*\d", text)) for text in (english, chinese)]
    assert figures[1] - figures[0] == set()


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip(
        "material", reason="mkdocs-material is not installed: pip install '.[docs]'"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file"]
    built = subprocess.run(
        [*command, SITE / "mkdocs.yml", "--site-dir", tmp_path / "site"],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    home = (tmp_path / "site/index.html").read_text()
    assert 'href="docs/tutorial/"' in home and "https://fonts." not in home
    assert (tmp_path / "site/docs/freezing.svg").is_file()

"""document.py: strict YAML, plain values with their lines."""

import subprocess
import sys
from pathlib import Path

import pytest

from tuner.config import yaml_document
from tuner.errors import SpaceError


def value(text: str) -> object:
    return yaml_document.parse_document(f"key: {text}", "f.yaml").content["key"]


def refusal(text: str) -> str:
    with pytest.raises(SpaceError) as caught:
        yaml_document.parse_document(text, "f.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 0.0001),
        ("1E+3", 1000.0),
        ("1_000", 1000),
        ("-3", -3),
        (".5", 0.5),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("true", True),
        ("yes", "yes"),
        ("no", "no"),
        ("True", "True"),
        ("null", None),
        ("", None),
        ("none", "none"),
        ("'1e-4'", "1e-4"),
        ("[1, a]", [1, "a"]),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("9" * 300, int("9" * 300)),
        ("9" * 301, "9" * 301),
        ("\N{ARABIC-INDIC DIGIT THREE}", "\N{ARABIC-INDIC DIGIT THREE}"),  # no number in YAML
        ("1.\N{DEVANAGARI DIGIT FIVE}", "1.\N{DEVANAGARI DIGIT FIVE}"),
    ],
)
def test_plain_words_mean_what_they_say(written: str, meant: object) -> None:
    found = value(written)
    assert found == meant and type(found) is type(meant)


def test_every_key_knows_its_line() -> None:
    doc = yaml_document.parse_document("a:\n  b: 1\n  c: [x,\n      y]\n", "f.yaml")
    assert doc.location(("a", "b")) == "f.yaml:2"
    assert doc.location(("a", "c", 1)) == "f.yaml:4"
    assert doc.location(("a", "missing")) == "f.yaml:1"  # its nearest written parent
    assert doc.location(("missing",)) == "f.yaml:1"


def test_a_duplicate_key_names_both_lines_and_every_one_is_found() -> None:
    doc = yaml_document.parse_document("a:\n  b: 1\n  b: 2\nc: 1\na: 3\n", "f.yaml")
    assert doc.problems == [
        "f.yaml:3: a.b: duplicate key, first written in line 2; keep one",
        "f.yaml:5: a: duplicate key, first written in line 1; keep one",
    ]


def test_a_message_stays_on_one_line_whatever_the_key_holds() -> None:
    doc = yaml_document.parse_document('"a\\nb": 1\n"a\\nb": 2\n', "f.yaml")
    assert doc.problems == ["f.yaml:2: a\\nb: duplicate key, first written in line 1; keep one"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "f.yaml:1: the file is empty; `tuner init` lists examples to begin with"),
        ("# nothing\n", "f.yaml:1: the file is empty; `tuner init` lists examples to begin with"),
        ("- a\n", "f.yaml:1: expected a mapping (task:, data:, model:, …) at the top, got a list"),
        (
            "a: 1\nb: &x 2\n",
            "f.yaml:2: anchors (&) and aliases (*) are not allowed; write the value out",
        ),
        ("&x a: 1\n", "f.yaml:1: anchors (&) and aliases (*) are not allowed; write the value out"),
        ("a: *x\n", "f.yaml:1: anchors (&) and aliases (*) are not allowed; write the value out"),
        ("a:\n  <<: {b: 1}\n", "f.yaml:2: merge keys (<<) are not allowed; write the values out"),
        (
            "a: !!python/object:os.system x\n",
            "f.yaml:1: tags such as 'tag:yaml.org,2002:python/object:os.system' are not allowed",
        ),
        ("!x a: 1\n", "f.yaml:1: tags such as '!x' are not allowed"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: only one document per file"),
        ("? [a]\n: 1\n", "f.yaml:1: a key must be a word"),
        ("a: 1\nb: [\n", "f.yaml:3: not valid YAML: "),
        (
            "a:\n    b: 1\nc:  # why\n\n# as above\n\td: 1\n",
            "f.yaml:6: not valid YAML: a tab before 'd: 1'; lines are indented by spaces: write 4 spaces instead",
        ),
        (
            "a:\n  b: 1\n  \tc: 1\n",
            "f.yaml:3: not valid YAML: a tab before 'c: 1'; lines are indented by spaces: write 2 spaces instead",
        ),
        (
            "\ta: 1\n",
            "f.yaml:1: not valid YAML: a tab before 'a: 1'; lines are indented by spaces: write nothing instead",
        ),
        ("a:\tb\n", "f.yaml:1: not valid YAML: a tab after 'a:'; write a space instead"),
        ("a: 1\n\t\n", "f.yaml:2: not valid YAML: a tab on an empty line; remove it"),
        ("a: 1\nb: \x07\n", "f.yaml:2: not valid YAML: the character U+0007 is not allowed"),
        ('a: 1\nb: "\\0"\n', "f.yaml:2: the character U+0000 is not allowed"),
        ('a: "\\ud800"\n', "f.yaml:1: the character U+D800 is not allowed"),
        (
            'a: "\\UFFFFFFFF"\n',
            "f.yaml:1: not valid YAML: an escape or directive holds a number that is too large",
        ),
        ("[" * 20_000, "f.yaml:1: nested deeper than 50 levels"),
        ("a: [" + "1, " * 10_001 + "]", "f.yaml:1: more than 10,000 values"),
    ],
)
def test_what_is_refused_says_where_and_why(text: str, says: str) -> None:
    assert refusal(text).startswith(says)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary, large, utf16 = tmp_path / "b.yaml", tmp_path / "l.yaml", tmp_path / "u.yaml"
    binary.write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    large.write_text("# " + "x" * 5_000_000)
    utf16.write_text("task: classification", encoding="utf-16")
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    for path, says in (
        (binary, f"{binary}:1: not a text file in UTF-8 (byte 0)"),
        (large, f"{large}:1: the file is too large; a space file has at most 200,000 bytes"),
        (utf16, f"{utf16}:1: not a text file in UTF-8 (byte 0)"),
        (tmp_path, f"{tmp_path}: is a folder; name the YAML file in it"),
        (tmp_path / "1234", f"{tmp_path / '1234'}: no such file"),
        (loop, f"{loop}: cannot be read (Too many levels of symbolic links)"),
        (
            Path("/dev/zero"),
            "/dev/zero:1: the file is too large; a space file has at most 200,000 bytes",
        ),
    ):
        with pytest.raises(SpaceError) as caught:
            yaml_document.read_document(path)
        assert str(caught.value) == says


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("task: classification", encoding="utf-8-sig")
    assert yaml_document.read_document(tmp_path / "f.yaml").content == {"task": "classification"}


HOSTILE = """
import sys, time
from pathlib import Path
from tuner.config import parsing
from tuner.errors import SpaceError

path = Path(sys.argv[1])
bomb = "a: &a [x, x]\\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\\n" for i in range(20))
for text in (bomb, "[" * 20_000, "{a: " * 20_000, "- " * 20_000, "x" * 5_000_000, "a: " + "b " * 90_000, "# x\\n" * 49_000,
             "a: [" + "1," * 90_000, "".join(f"k{i}: 1\\n" for i in range(20_000)), "a: !!python/object/apply:os.system [ls]"):
    path.write_text(text)
    start = time.process_time()
    try:
        parsing.load_space(path)
    except SpaceError:
        pass
    else:
        sys.exit(f"accepted {text[:40]!r}")
    if time.process_time() - start > 1:
        sys.exit(f"{time.process_time() - start:.1f} s for {text[:40]!r}")
# of this program alone: ru_maxrss would count the process that started it
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
sys.exit(f"{peak:.0f} MB" if peak > 100 else 0)
"""


def test_hostile_files_take_neither_time_nor_memory(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path / "f.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")

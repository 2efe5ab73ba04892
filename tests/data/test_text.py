"""data/text.py: files of texts, and everything that can be wrong with them, each told with its line and the way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CommandResult
from tests.helpers import small_transformers
from tuner.config.data_options import SplitOptions
from tuner.core.input_spec import IMAGENET_SPEC, TextInputSpec
from tuner.core.types import Dataset
from tuner.data import text
from tuner.data._rows import read_rows
from tuner.errors import DataError, SpaceError
from tuner.preprocessing import tokenization

pytest.importorskip("transformers")
LINES = "".join(f"{'ham' if i % 2 else 'spam'}\tfine film {i} day\n" for i in range(40))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> TextInputSpec:
    root = tmp_path_factory.mktemp("bert")
    return TextInputSpec(
        str(small_transformers.write_model_folder(root, "bert", weights=False)),
        16,
        ("input_ids", "attention_mask", "token_type_ids"),
    )


def load(
    wanted: TextInputSpec,
    path: Path,
    task: str = "text_classification",
    split: SplitOptions | None = None,
    **keys: Any,
) -> Dataset:
    return text.load(
        path.parent / "home", wanted, task, path=str(path), options=split or SplitOptions(), **keys
    )


def wrote(tmp_path: Path, content: str | bytes, name: str = "m.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source: Any, wanted: TextInputSpec) -> list[str]:
    return tokenization.decode_texts(wanted, source.take(torch.arange(len(source)), 0).x)


FORMS = {
    "messages": "Label\tSMS\n" + LINES,
    "m.tsv": "label\ttext\n" + LINES,
    "bare.tsv": LINES,
    "m.csv": "label,text\n" + LINES.replace("\t", ","),
    "semicolon.csv": "label;text\n" + LINES.replace("\t", ";"),
    "m.jsonl": "".join(
        json.dumps(dict(zip(("label", "text"), line.split("\t"), strict=True))) + "\n"
        for line in LINES.splitlines()
    ),
    "windows.csv": "\ufefflabel,text\r\n" + LINES.replace("\t", ",").replace("\n", "\r\n"),
    "quoted.csv": "label,text\n"
    + "".join('{},"{}"\n'.format(*line.split("\t")) for line in LINES.splitlines()),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_examples(
    name: str, wanted: TextInputSpec, tmp_path: Path
) -> None:
    keys = {"text": "2", "label": "1"} if name == "bare.tsv" else {}
    data = load(wanted, wrote(tmp_path, FORMS[name], name), **keys)
    assert (data.classes, len(data.train), len(data.valid), len(data.test), len(data.full)) == (
        ("ham", "spam"),
        28,
        6,
        6,
        34,
    )
    x = data.train.take(torch.tensor([0, 1]), 0).x
    assert (
        isinstance(x, dict)
        and {leaf.dtype for leaf in x.values()} == {torch.int64}
        and x["input_ids"].shape == (2, 16)
    )
    assert read(data.train, wanted)[0].startswith("fine film") and not data.warnings
    assert (
        data.train.digest == load(wanted, wrote(tmp_path, FORMS["m.csv"], "other.csv")).train.digest
    )


def test_quotation_marks_in_tab_separated_values_are_characters(tmp_path: Path) -> None:
    found = read_rows(
        wrote(tmp_path, 'label\ttext\nham\t"Oh, he said\nspam\tbuy "now"\n', "q.tsv"),
        None,
        ("text", "label"),
    )
    assert found.values == [("ham", '"Oh, he said'), ("spam", 'buy "now"')] and found.lines == [
        2,
        3,
    ]


def test_a_text_over_several_lines_keeps_its_first_lines_number(tmp_path: Path) -> None:
    found = read_rows(
        wrote(tmp_path, 'text,label\n"one\ntwo",a\nthree,b\n'), None, ("text", "label")
    )
    assert found.values == [("one\ntwo", "a"), ("three", "b")] and found.lines == [2, 4]


@pytest.mark.parametrize(
    ("content", "name", "keys", "said"),
    [
        (
            "text,label\na,b,c\nd,e\nf\n",
            "m.csv",
            {},
            r"m.csv:2: 3 columns, the first row has 2\n.*m.csv:4: 1 columns.*\n.*2 of 3 rows are broken",
        ),
        (
            'text,label\nfine,a\n"never closed,b\n',
            "m.csv",
            {},
            r"m.csv:3: the row that begins here cannot be read.*quotation mark missing",
        ),
        (
            f"text,label\n{'x' * 200_000},a\n",
            "m.csv",
            {},
            r"m.csv:2: the row that begins here cannot be read \(field larger than field limit",
        ),
        ("text\tlabel\na\tb\tc\n", "m.tsv", {}, "a text must hold no tab"),
        (b"text,label\nfine,a\ncaf\xe9,b\n", "m.csv", {}, r"m.csv:3: not UTF-8 \(byte 0xe9\)"),
        ("text,label\na\0,b\n", "m.csv", {}, "m.csv:2: holds a NUL"),
        ("", "m.csv", {}, "holds no examples"),
        ("text,label\n", "m.csv", {}, "holds no examples"),
        ("text,text\na,b\n", "m.csv", {}, "m.csv:1: the column 'text' is there twice"),
        (
            '{"text": "a", "label": "b"}\nnope\n[1]\n',
            "m.jsonl",
            {},
            r"m.jsonl:2: not JSON.*\n.*m.jsonl:3: expected an object.*got list",
        ),
        ('[{"text": "a"}]', "m.json", {}, "is one JSON list; write JSON lines"),
        (
            "text,label\na,b\n",
            "m.csv",
            {"text": "txet"},
            r"data.text: .* has no column 'txet'; did you mean 'text'\? \(it has 'text', 'label'\)",
        ),
        (
            "text,label\na,b\n",
            "m.csv",
            {"label": "klass"},
            r"data.label: .* has no column 'klass' \(it has",
        ),
        (
            "text,label\na,b\n",
            "m.csv",
            {"second": "other"},
            "data.second: .* has no column 'other'",
        ),
        (
            "one,two,label\na,b,c\n",
            "m.csv",
            {},
            r"data.text: which column .* holds the texts\? no column has a usual name: 'one', 'two'; write data: \{text: ",
        ),
        (
            "text,class,category\na,b,c\n",
            "m.csv",
            {},
            r"data.label: .*several columns may be it: 'class', 'category'; write data: \{label: ",
        ),
        (
            "text,label\na,x\n,y\n,x\nb,x\nc,y\n",
            "m.csv",
            {},
            "2 of 5 texts are empty, at lines 3, 4; fill or remove",
        ),
        (
            "text,label\na,x\nb,\n",
            "m.csv",
            {},
            "1 rows without a label, at line 3; label or remove",
        ),
        (
            "text,label\n" + "".join(f"t{i},x\n" for i in range(20)),
            "m.csv",
            {},
            r"at least 2 classes, found 1 \('x'\)",
        ),
        (
            "text,label\n" + "".join(f"t{i},{i}\n" for i in range(50)),
            "m.csv",
            {},
            "50 different labels of 50 examples; is it the right column",
        ),
        (
            "text,label\na,x\nb,y\nc,x\nd,y\n",
            "m.csv",
            {},
            "each class needs at least 3 examples to be split",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line(
    content: str | bytes,
    name: str,
    keys: dict[str, Any],
    said: str,
    wanted: TextInputSpec,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=said):
        load(wanted, wrote(tmp_path, content, name), **keys)


def test_places_that_are_not_there(wanted: TextInputSpec, tmp_path: Path) -> None:
    wrote(tmp_path, FORMS["m.csv"], "messages.csv")
    with pytest.raises(DataError, match=r"does not exist .*did you mean 'messages.csv'"):
        load(wanted, tmp_path / "mesages.csv")
    with pytest.raises(
        DataError, match=r"has no train file, such as train.csv \(it holds messages.csv\)"
    ):
        load(wanted, tmp_path)
    with pytest.raises(SpaceError, match="these are texts, but the model wants images"):
        text.load(tmp_path, IMAGENET_SPEC, "text_classification", path="x", options=SplitOptions())


def test_a_folder_of_parts_is_taken_as_it_is(wanted: TextInputSpec, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, count, seed in (("train.csv", 40, 0), ("dev.csv", 10, 1), ("test.csv", 6, 2)):
        small_transformers.write_csv(folder / name, count, seed)
    data = load(wanted, folder)
    assert (len(data.train), len(data.valid), len(data.test)) == (40, 10, 6)
    (folder / "test.csv").unlink()
    data = load(wanted, folder)
    assert (len(data.train), len(data.valid), len(data.test)) == (34, 10, 6)
    small_transformers.write_csv(folder / "valid.csv", 6)
    with pytest.raises(DataError, match=r"has dev.csv and valid.csv, which mean the same part"):
        load(wanted, folder)
    (folder / "valid.csv").unlink()
    (folder / "dev.csv").write_text("text,label\nwell,strange\n")
    with pytest.raises(
        DataError, match=r"dev.csv:2: the label 'strange' does not occur in train.csv"
    ):
        load(wanted, folder)


def test_an_empty_text_among_many_is_left_out_with_a_warning(
    wanted: TextInputSpec, tmp_path: Path
) -> None:
    data = load(wanted, wrote(tmp_path, "label,text\n" + LINES.replace("\t", ",") + "ham, \n"))
    assert len(data.full) + len(data.test) == 40
    assert data.warnings == (
        f"data.path: {tmp_path / 'm.csv'}: 1 of 41 texts are empty, at line 42; left out",
    )


def test_long_texts_and_duplicates_between_parts_are_counted(
    wanted: TextInputSpec, tmp_path: Path
) -> None:
    long = "ham," + "word " * 60
    again = "spam,the very same\n" * 10
    data = load(wanted, wrote(tmp_path, f"label,text\n{LINES.replace(chr(9), ',')}{long}\n{again}"))
    shared = [w for w in data.warnings if "are also training texts" in w]
    assert len(shared) == 2 and "validation texts" in shared[0] and "test texts" in shared[1]
    assert (
        f"data: 1 of 51 texts ({1 / 51:.1%}) are longer than 16 tokens and are cut; raise model.length to keep more"
        in data.warnings
    )


def test_classes_that_are_numbers_are_ordered_by_value(
    wanted: TextInputSpec, tmp_path: Path
) -> None:
    data = load(
        wanted,
        wrote(
            tmp_path,
            "".join(json.dumps({"text": f"t{i}", "label": i % 11}) + "\n" for i in range(66)),
            "m.jsonl",
        ),
    )
    assert data.classes == tuple(map(str, range(11)))


def test_pairs_of_texts_have_segments_of_their_own(wanted: TextInputSpec, tmp_path: Path) -> None:
    content = "text,other,label\n" + "".join(
        f"fine {i},cold film,{'yes' if i % 2 else 'no'}\n" for i in range(20)
    )
    data = load(wanted, wrote(tmp_path, content), second="other")
    x = data.train.take(torch.tensor([0]), 0).x
    assert (
        isinstance(x, dict)
        and x["token_type_ids"].sum() > 0
        and "cold film" in read(data.train, wanted)[0]
    )


def test_folds_and_limits_keep_the_classes_in_proportion(
    wanted: TextInputSpec, tmp_path: Path
) -> None:
    path = small_transformers.write_csv(tmp_path / "m.csv", 100)
    held = [load(wanted, path, split=SplitOptions(folds=3, fold=fold)) for fold in range(3)]
    assert len({d.test.digest for d in held}) == 1 and len({d.valid.digest for d in held}) == 3
    assert sum(len(d.valid) for d in held) == 84 and all(
        abs(int(d.valid.take(torch.arange(len(d.valid)), 0).y.sum()) - 14) <= 1 for d in held
    )
    limited = load(wanted, path, split=SplitOptions(limit=10))
    assert [len(s) for s in (limited.train, limited.valid, limited.test)] == [10, 10, 10]
    assert int(limited.train.take(torch.arange(10), 0).y.sum()) == 5


def test_texts_to_be_continued_need_no_labels_and_end(tmp_path: Path) -> None:
    wanted = TextInputSpec(
        str(small_transformers.write_model_folder(tmp_path / "models", "gpt2", weights=False)), 16
    )
    data = load(
        wanted,
        wrote(tmp_path, "".join(f"fine {i}\n" for i in range(20)) + "\n", "lines.txt"),
        "text_generation",
    )
    assert data.classes == () and len(data.full) + len(data.test) == 20
    x, y = data.train.take(torch.tensor([0]), 0)
    assert isinstance(x, dict) and isinstance(y, torch.Tensor)
    ids = x["input_ids"][0][x["attention_mask"][0].bool()].tolist()
    assert ids[-1] == 3 and ids.count(3) == 1 and y.tolist() == [len(ids)]  # <|endoftext|>


def test_texts_are_encoded_once_and_by_content(
    wanted: TextInputSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(wanted, wrote(tmp_path, FORMS["m.csv"]))
    monkeypatch.setattr(
        "tuner.preprocessing.tokenization._encode_int32", lambda *_: pytest.fail("encoded again")
    )
    again = load(wanted, wrote(tmp_path, FORMS["m.tsv"], "elsewhere.tsv"))
    assert (
        again.digest == first.digest
        and len(list((tmp_path / "home" / "tokens").glob("[0-9a-f]*[0-9a-f]"))) == 1
    )
    monkeypatch.undo()
    row = torch.tensor([3])
    before = first.train.take(row, 0).x
    (shard,) = (tmp_path / "home" / "tokens").glob("*/0.bin")
    shard.write_bytes(b"cut short")
    after = load(wanted, tmp_path / "m.csv").train.take(row, 0).x  # made anew
    assert (
        isinstance(before, dict)
        and isinstance(after, dict)
        and torch.equal(after["input_ids"], before["input_ids"])
    )
    other = TextInputSpec(wanted.tokenizer_folder, 12, wanted.input_names)
    assert load(other, tmp_path / "m.csv").digest != first.digest


def test_half_a_character_is_encoded_as_a_question_mark(wanted: TextInputSpec) -> None:
    """JSON may hold one half of an escape, and a command line bytes that are no UTF-8."""
    half, mark = (
        tokenization.encode_texts(wanted, [f"good {character} film"])["input_ids"]
        for character in "\ud83d?"
    )
    assert torch.equal(half, mark)
    found = [tokenization.locate_tokens(wanted, [f"good {c} film"]) for c in "\ud83d?"]
    assert torch.equal(*found)


def test_the_command_line_tells_it_without_a_traceback(
    wanted: TextInputSpec, tuner: Callable[..., CommandResult]
) -> None:
    Path("m.csv").write_bytes(b"text,label\nfine,a\ncaf\xe9,b\n")
    Path("x.yaml").write_text(
        f"task: text_classification\ndata: {{name: text, path: m.csv}}\nmodel: {{name: bert, folder: {wanted.tokenizer_folder}, weights: none, length: 16}}\n"
        "engine: {name: inline, device: cpu}\n"
    )
    said = tuner("check", "x.yaml")
    assert said.code == 3 and "m.csv:3: not UTF-8" in said.err and "Traceback" not in said.err
    assert "text_classification is for" not in said.err and not Path("studies").exists()
    wrong = tuner("check", "x.yaml", "data=digits")
    assert (
        wrong.code == 2
        and "digits is for classification, not for text_classification (allowed: huggingface, text)"
        in wrong.err
    )


def test_splits_are_subsets_of_one_source(wanted: TextInputSpec, tmp_path: Path) -> None:
    """What frozen stages compute for them is then computed once, for all folds."""
    path = small_transformers.write_csv(tmp_path / "m.csv", 40)
    folds = [load(wanted, path, split=SplitOptions(folds=3, fold=fold)) for fold in range(3)]
    wholes = {part.whole.digest for d in folds for part in (d.train, d.valid)}  # type: ignore[attr-defined]
    assert wholes == {folds[0].full.digest}
    for data in folds:
        texts = read(data.full, wanted)
        assert sorted(texts) == sorted(read(data.train, wanted) + read(data.valid, wanted))
        assert not set(read(data.test, wanted)) & set(texts)

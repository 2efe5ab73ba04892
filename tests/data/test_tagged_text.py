"""Texts with tags: both kinds of files mean the same, the first token of a word has its tag, and errors name rows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import small_transformers, tagged_files
from tuner.config.data_options import SplitOptions
from tuner.core.input_spec import TextInputSpec
from tuner.core.types import Dataset
from tuner.data import tagged_text
from tuner.data._tagged_files import normalise_tags, read_tagged_file
from tuner.errors import DataError
from tuner.preprocessing.splits import assign_and_limit_splits
from tuner.preprocessing.word_alignment import align_words, find_words


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return small_transformers.write_model_folder(tmp_path_factory.mktemp("model"), "bert")


def load(path: Path, bert: Path, length: int = 32, group: str | None = None) -> Dataset:
    spec = TextInputSpec(str(bert), length)
    return tagged_text.load(
        path.parent,
        spec,
        "token_classification",
        path=str(path),
        group=group,
        options=SplitOptions(),
    )


def test_conll_and_spans_are_the_same_data(bert: Path, tmp_path: Path) -> None:
    tabs = tagged_files.write_conll(tmp_path / "tabs.conll")
    spaces = tagged_files.write_conll(tmp_path / "spaces.txt", between=" X NP ")  # four columns
    spans = tagged_files.write_spans(tmp_path / "spans.jsonl")
    words = tmp_path / "words.jsonl"
    rows = [
        {"tokens": [w for w, _ in sentence], "tags": [t for _, t in sentence]}
        for sentence in tagged_files.make_sentences(60)
    ]
    words.write_text("\n".join(map(json.dumps, rows)))
    expected, *others = [load(path, bert) for path in (tabs, spaces, spans, words)]
    assert expected.classes == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    for other in others:
        assert other.classes == expected.classes
        index = torch.arange(len(expected.full))
        assert torch.equal(
            other.full.take(index, 0).y,  # type: ignore[arg-type]
            expected.full.take(index, 0).y,  # type: ignore[arg-type]
        )


def write_documents(root: Path, kind: str) -> Path:
    """Twelve documents of five sentences; the number of the document is a word of each sentence."""
    numbered = [
        [(f"{i // 5}", "O"), *sentence]
        for i, sentence in enumerate(tagged_files.make_sentences(60))
    ]
    if kind == "conll":
        lines = [
            ("" if i % 5 else "-DOCSTART- -X- O O\n\n")
            + "".join(f"{word} {tag}\n" for word, tag in sentence)
            for i, sentence in enumerate(numbered)
        ]
    else:
        lines = [
            json.dumps(
                {
                    "tokens": [word for word, _ in sentence],
                    "tags": [tag for _, tag in sentence],
                    "author": f"writer {sentence[0][0]}",
                }
            )
            for sentence in numbered
        ]
    path = root / f"documents.{kind}"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("kind", "group"), [("conll", "document"), ("jsonl", "author")])
def test_sentences_of_a_group_are_in_one_split(
    kind: str, group: str, bert: Path, tmp_path: Path
) -> None:
    path = write_documents(tmp_path, kind)
    file = read_tagged_file(path, group)
    items = tagged_text.make_items({-1: file})
    assert len(items.group_names) == 12
    numbers = [text.text.split()[0] for text in file.texts]
    pairs = set(zip(numbers, file.groups, strict=True))
    assert len(pairs) == 12
    split = assign_and_limit_splits(items, SplitOptions())
    homes = {
        (text.text.split()[0], at) for text, at in zip(split.examples, split.split, strict=True)
    }
    assert len(homes) == 12 and len({at for _, at in homes}) == 3
    data, alone = load(path, bert, group=group), load(path, bert)
    assert data.train.digest != alone.train.digest


@pytest.mark.parametrize(
    ("kind", "group", "said"),
    [
        ("conll", "documents", "write group: document"),
        ("jsonl", "autor", "no column 'autor'; did you mean 'author'?"),
    ],
)
def test_groups_that_a_file_lacks_are_refused(
    kind: str, group: str, said: str, tmp_path: Path
) -> None:
    path = write_documents(tmp_path, kind)
    with pytest.raises(DataError, match=re.escape(said)):
        read_tagged_file(path, group)
    names = tagged_files.write_conll(tmp_path / "names.conll")
    with pytest.raises(DataError, match=r"-DOCSTART-.*drop the key"):
        read_tagged_file(names, "document")


def test_the_first_token_of_a_word_has_its_tag_and_the_others_none(
    bert: Path, tmp_path: Path
) -> None:
    from tuner.preprocessing.tokenization import load_tokenizer

    data = load(tagged_files.write_conll(tmp_path / "names.conll"), bert)
    x, y = data.full.take(torch.arange(len(data.full)), 0)
    assert isinstance(x, dict) and isinstance(y, torch.Tensor) and y.dtype == torch.int16
    assert set(x) == {"input_ids", "attention_mask"}
    tokenizer = load_tokenizer(str(bert))
    several = 0
    for ids, tags in zip(x["input_ids"], y.tolist(), strict=True):
        for token, tag in zip(tokenizer.convert_ids_to_tokens(ids), tags, strict=True):
            is_first = token not in ("[CLS]", "[SEP]", "[PAD]") and not token.startswith("##")
            assert (tag != -100) == is_first, token
            several += token.startswith("##")
    assert several > 50


def test_words_behind_the_cut_are_counted_in_a_warning(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.conll"
    path.write_text("\n\n".join("ann B-PER\n" + "day O\n" * 9 for _ in range(20)))
    data = load(path, bert, length=6)
    (warning,) = [text for text in data.warnings if "longer than" in text]
    assert "20 of 20 texts (100.0%) are longer than 6 tokens" in warning
    seen = int((data.full.take(torch.arange(len(data.full)), 0).y != -100).sum())  # type: ignore[operator]
    per_text = seen // len(data.full)
    assert f"{20 * (10 - per_text)} of 200 words are neither learnt nor scored" in warning


@pytest.mark.parametrize(
    ("tags", "normal"),
    [
        ("I-A I-A O I-A", "B-A I-A O B-A"),  # CoNLL-2003: B- only where an entity follows another
        ("I-A B-A I-B", "B-A B-A B-B"),
        ("S-A B-A E-A U-B L-B", "B-A B-A I-A B-B I-B"),
        ("B-a-b I-a-b", "B-a-b I-a-b"),
    ],
)
def test_other_schemes_become_bio(tags: str, normal: str) -> None:
    assert " ".join(normalise_tags(tags.split())) == normal


def test_words_of_texts() -> None:
    text = "St. Moritz, 東京!"
    assert [text[a:b] for a, b in find_words(text, "punctuation")] == [
        "St", ".", "Moritz", ",", "東", "京", "!",
    ]  # fmt: skip
    assert [text[a:b] for a, b in find_words(text, "spaces")] == ["St.", "Moritz,", "東京!"]


def test_a_word_without_a_token_of_its_own_is_passed_over() -> None:
    words = [(0, 2), (2, 3), (4, 6)]
    starts = np.array(
        [-1, 0, 1, 4, -1], np.int32
    )  # the second token of the first word holds (2, 3)
    numbers, positions = align_words(words, starts)
    assert (numbers.tolist(), positions.tolist()) == ([0, 2], [1, 3])


def test_a_line_of_empty_cells_ends_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("ann\tB-PER\n\t\nday\tO\n")
    assert [text.text for text in read_tagged_file(path).texts] == ["ann", "day"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.conll", "ann B-PER\nday\n", "a.conll:2: 'day' has no tag behind it"),
        ("a.conll", "ann B-PER\n\nday PER\n", "a.conll:3: 'PER' is no tag"),
        ("a.conll", "ann\tB-PER\n \tO\nday\tO\n", "a.conll:2: no word before the tag 'O'; remove"),
        ("a.conll", "ann B-\n", "a.conll:1: 'B-' is no tag"),
        ("a.conll", "ann O\n", "every word has the tag O, so there is nothing to learn"),
        ("a.conll", "\n\n", "holds no texts with tags"),
        ("a.csv", "text,label\n", "tagged words are in a CoNLL file"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', "a.jsonl:1: 2 tokens, but 1 tags"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [3]}', "a.jsonl:1: the tag 3 is no text"),
        ("a.jsonl", '{"tokens": "a", "tags": ["O"]}', "a.jsonl:1: 'a' is no list of words"),
        ("a.jsonl", '{"tokens": ["a"], "tag": ["O"]}', "did you mean 'tags'"),
        (
            "a.jsonl",
            '{"text": "ann day", "spans": [[0, 7, "PER"], [4, 7, "DAY"]]}',
            "a.jsonl:1: the spans 0-7 (PER) and 4-7 (DAY) overlap",
        ),
        (
            "a.jsonl",
            '{"text": "ann", "spans": [{"start": 0, "end": 4, "label": "PER"}]}',
            "a.jsonl:1: the span 0-4 (PER) is not inside the text, which has 3 characters",
        ),
        ("a.jsonl", '{"text": "a  b", "spans": [[1, 2, "X"]]}', "a.jsonl:1: the span 1-2 (X) covers spaces alone"),
        ("a.jsonl", '{"text": "a b", "spans": [{"start": 0}]}', "is no span; write"),
    ],
)  # fmt: skip
def test_wrong_files_name_the_row_and_the_remedy(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        tagged_text.make_items({-1: read_tagged_file(path)})
    assert says in str(caught.value)


def test_a_span_inside_a_word_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "lowells day", "spans": [[0, 6, "PER"]]}\n')
    (warning,) = read_tagged_file(path).warnings
    assert "in 1 of 1 texts a span begins or ends inside a word" in warning


def test_a_type_that_only_the_test_file_has_is_named(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "train.conll").write_text("ann B-PER\n\n" * 9)
    (folder / "test.conll").write_text("ann B-PER\n\nlodz B-LOC\n")
    with pytest.raises(DataError, match=r"test.conll:3: the type 'LOC' does not occur in train"):
        load(folder, bert)


def test_init_knows_files_of_tagged_words(tmp_path: Path) -> None:
    from tuner.commands.data_scan import scan_data

    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("train.conll", "test.conll"):
        tagged_files.write_conll(folder / name, 12)
    files = [
        tagged_files.write_conll(tmp_path / "a.conll", 24),
        tagged_files.write_spans(tmp_path / "a.jsonl", 24),
        folder,
    ]
    for path in files:
        (reading,) = scan_data(str(path))
        assert (reading.task, reading.source) == ("token_classification", "tagged_text")
        assert reading.examples == 24

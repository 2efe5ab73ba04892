"""`data.pack`: texts to be continued are joined and cut into blocks, and no token is lost."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import small_transformers
from tuner.config.data_options import SplitOptions
from tuner.config.run import Recipe
from tuner.core.input_spec import TextInputSpec
from tuner.core.types import Dataset, Source
from tuner.data import text
from tuner.errors import SpaceError
from tuner.preprocessing import packed_texts
from tuner.preprocessing.splits import all_for_testing
from tuner.tasks.text_generation import build

pytest.importorskip("transformers")
LENGTH = 16
WHOLE = 400  # tokens; more than any text has
END = 3  # <|endoftext|>


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TextInputSpec:
    root = tmp_path_factory.mktemp("gpt2")
    return TextInputSpec(str(small_transformers.write_model_folder(root, "gpt2")), LENGTH)


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    """30 texts of 10 groups; every fifth is longer than two blocks."""
    corpus = [words for words, _ in small_transformers.make_corpus(30)]
    lines = [
        f"{'very ' * (40 if i % 5 == 0 else 1)}{words},g{i % 10}" for i, words in enumerate(corpus)
    ]
    path = tmp_path / "messages.csv"
    path.write_text("\n".join(["text,who", *lines]) + "\n")
    return path


def load(spec: TextInputSpec, path: Path, *, pack: bool = True, **keys: Any) -> Dataset:
    options = SplitOptions(**{k: keys.pop(k) for k in ("folds", "fold", "limit") if k in keys})
    home = path.parent / "home"
    return text.load(
        home, spec, "text_generation", path=str(path), pack=pack, options=options, **keys
    )


def rows(source: Source) -> list[list[int]]:
    """The token ids of each example, without padding."""
    x = source.take(torch.arange(len(source)), 0).x
    assert isinstance(x, dict)
    pairs = zip(x["input_ids"], x["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def joined(source: Source) -> list[int]:
    return [token for row in rows(source) for token in row]


def test_every_token_of_a_split_is_in_its_blocks_once(spec: TextInputSpec, messages: Path) -> None:
    whole = TextInputSpec(spec.tokenizer_folder, WHOLE)
    texts, packed = load(whole, messages, pack=False), load(spec, messages)
    for name in ("train", "valid", "test"):
        expected, blocks = getattr(texts, name), rows(getattr(packed, name))
        assert all(row[-1] == END for row in rows(expected))
        assert max(map(len, rows(expected))) > LENGTH
        assert [token for block in blocks for token in block] == joined(expected)
        assert {len(block) for block in blocks[:-1]} == {LENGTH} and 1 <= len(blocks[-1]) <= LENGTH
    assert joined(packed.full) == joined(packed.train) + joined(packed.valid)
    assert not [warning for warning in packed.warnings if "are cut" in warning]
    y = packed.train.take(torch.arange(len(packed.train)), 0).y
    assert isinstance(y, torch.Tensor) and y.tolist() == [len(b) for b in rows(packed.train)]


def test_without_it_texts_are_cut_as_ever_and_the_way_out_is_said(
    spec: TextInputSpec, messages: Path
) -> None:
    whole = TextInputSpec(spec.tokenizer_folder, WHOLE)
    cut = load(spec, messages, pack=False)
    assert rows(cut.train) == [
        row[:LENGTH] for row in rows(load(whole, messages, pack=False).train)
    ]
    (warning,) = cut.warnings
    assert "are longer than 16 tokens and are cut" in warning
    assert warning.endswith("or write data: {pack: true}")


def test_the_perplexity_is_of_all_tokens_as_the_library_has_it(
    spec: TextInputSpec, messages: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec.tokenizer_folder).eval()
    blocks = rows(load(spec, messages).valid)
    total = 0.0
    with torch.no_grad():
        for block in blocks:
            ids = torch.tensor([block])
            total += float(model(input_ids=ids, labels=ids).loss) * (len(block) - 1)
    tokens = sum(map(len, blocks)) - len(blocks)  # nothing comes before the first of a block
    task = build((), Recipe())
    x, y = load(spec, messages).valid.take(torch.arange(len(blocks)), 0)
    with torch.no_grad():
        predictions = task.predict(lambda x: model(**x).logits, x)  # type: ignore[arg-type]
    assert isinstance(predictions, dict) and int(predictions["tokens"].sum()) == tokens
    perplexity = task.score([(predictions, y)])["perplexity"]
    assert perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_folds_share_their_blocks_and_no_block_has_texts_of_two_folds(
    spec: TextInputSpec, messages: Path
) -> None:
    whole = TextInputSpec(spec.tokenizer_folder, WHOLE)
    packed = [load(spec, messages, folds=3, fold=i, group="who") for i in range(3)]
    assert len({data.full.digest for data in packed}) == 1
    assert len({data.test.digest for data in packed}) == 1
    assert len({data.digest for data in packed}) == 3
    for fold, data in enumerate(packed):
        options = {"folds": 3, "fold": fold, "group": "who", "pack": False}
        texts = load(whole, messages, **options)
        assert joined(data.valid) == joined(texts.valid)
        assert sorted(joined(data.train)) == sorted(joined(texts.train))
    validated = [joined(data.valid) for data in packed]
    assert sorted(token for ids in validated for token in ids) == sorted(joined(packed[0].full))


def test_blocks_are_made_once_and_kept_by_what_they_are_made_of(
    spec: TextInputSpec, messages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(spec, messages)
    monkeypatch.setattr(packed_texts, "_encode_whole", lambda *_: pytest.fail("made again"))
    assert load(spec, messages).digest == first.digest
    monkeypatch.undo()
    shorter = TextInputSpec(spec.tokenizer_folder, 12)
    others = [
        load(spec, messages, pack=False),
        load(shorter, messages),
        load(spec, messages, limit=10),
    ]
    others.append(load(spec, messages, folds=3))
    assert len({first.digest, *(other.digest for other in others)}) == 5


def test_blocks_of_a_test_with_new_data_are_read_as_texts(
    spec: TextInputSpec, messages: Path
) -> None:
    with all_for_testing() as new:
        data = load(spec, messages)
    assert len(new.examples) == len(data.test) and "very very" in new.examples[0]


@pytest.mark.parametrize(
    ("task", "second", "said"),
    [
        ("text_classification", None, "data.pack.*the task is text_classification.*leave the key"),
        ("text_generation", "who", "data.second names a column of second texts"),
    ],
)
def test_where_nothing_can_be_packed(
    task: str, second: str | None, said: str, spec: TextInputSpec, messages: Path
) -> None:
    with pytest.raises(SpaceError, match=said):
        text.load(
            messages.parent / "home",
            spec,
            task,
            path=str(messages),
            second=second,
            pack=True,
            options=SplitOptions(),
        )

"""Names in texts, from a file to an export that finds them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult
from tests.helpers import small_transformers, tagged_files


@pytest.mark.parametrize(
    "formats",
    [
        pytest.param(("safetensors",), id="native"),
        pytest.param(
            ("safetensors", "onnx", "torch_export", "pretrained"),
            id="every-format",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tagged_texts_from_a_file_to_a_prediction(
    formats: tuple[str, ...], tuner: Callable[..., CommandResult]
) -> None:
    pytest.importorskip("transformers")
    if "onnx" in formats:
        pytest.importorskip("onnxruntime")
    small_transformers.write_model_folder(Path(), "bert")
    tagged_files.write_conll(Path("names.conll"), 180)
    Path("t.yaml").write_text(
        "task: token_classification\ndata: {name: tagged_text, path: names.conll}\n"
        "model: {name: bert, folder: bert, length: 32, dropout: 0.0}\n"
        "recipe: {freeze_depth: 0, epochs: 10, lr: 0.005, batch_size: 8}\n"
        "search: {trials: 1}\nengine: {name: inline, device: cpu}\n"
        f"export: [{', '.join(formats)}]\n"
    )
    said = tuner("run", "t.yaml")
    assert said.code == 0, said.err
    manifest = json.loads(Path("studies/t/export/manifest.json").read_text())
    assert manifest["classes"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert manifest["scores"]["test"]["entity_f1"] > 0.7
    assert set(manifest["scores"]["per_class"]) == {"PER", "LOC"}
    texts, names = labelled_texts(Path("new.jsonl"))
    by_format = {}
    for kind in formats:
        said = tuner("predict", "t", *texts, "--json", "--format", kind)
        assert said.code == 0, said.err
        lines = [json.loads(line)["entities"] for line in said.out.splitlines()]
        found = entities_at(lines, texts)
        # a BERT of random weights that saw 180 sentences takes a few other words for names too
        assert len(found & names) > 0.6 * len(names) and len(found) < 2 * len(names)
        by_format[kind] = found
    assert all(found == by_format["safetensors"] for found in by_format.values())
    said = tuner("predict", "t", texts[0], "--csv", "found.csv", "--min", "1")
    assert said.code == 0 and Path("found.csv").read_text().count("\n") == 1
    said = tuner("test", "t", "new.jsonl")
    assert said.code == 0 and "entity f1" in said.out, said.err


def labelled_texts(file: Path) -> tuple[list[str], set[tuple[int, int, int, str]]]:
    """Sentences the search did not see, and (sentence, start, end, label) of each name in them."""
    tagged_files.write_spans(file, 20, seed=9)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    spans = {
        (number, span["start"], span["end"], span["label"])
        for number, row in enumerate(rows)
        for span in row["spans"]
    }
    return [row["text"] for row in rows], spans


def entities_at(
    lines: list[list[dict[str, Any]]], texts: list[str]
) -> set[tuple[int, int, int, str]]:
    """(sentence, start, end, label) of each entity. Each says its text and how sure it is."""
    for text, entities in zip(texts, lines, strict=True):
        for entity in entities:
            assert text[entity["start"] : entity["end"]] == entity["text"]
            assert 0 < entity["probability"] <= 1
    return {
        (number, entity["start"], entity["end"], entity["label"])
        for number, entities in enumerate(lines)
        for entity in entities
    }

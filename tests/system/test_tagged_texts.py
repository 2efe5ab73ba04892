"""Names in texts, from a file to an export that finds them."""

import json
from collections.abc import Callable
from pathlib import Path

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
    text = "We met Ann Lowell in New Haven on a warm day"
    for kind in formats:
        said = tuner("predict", "t", text, "bad hours", "--json", "--format", kind)
        assert said.code == 0, said.err
        one, none = (json.loads(line)["entities"] for line in said.out.splitlines())
        assert none == []
        # a BERT of random weights that saw 180 sentences may also take a mark for a name
        found = {(e["label"], e["text"]) for e in one}
        assert found >= {("PER", "Ann Lowell"), ("LOC", "New Haven")} and len(found) <= 3
        for entity in one:
            assert text[entity["start"] : entity["end"]] == entity["text"]
            assert 0 < entity["probability"] <= 1
    said = tuner("predict", "t", text, "--csv", "found.csv", "--min", "1")
    assert said.code == 0 and Path("found.csv").read_text().count("\n") == 1
    tagged_files.write_spans(Path("new.jsonl"), 20, seed=9)
    said = tuner("test", "t", "new.jsonl")
    assert said.code == 0 and "entity f1" in said.out, said.err

"""Formats that lose a little are published where the validation score holds; each export's README is true without tuner."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from tests.conftest import SMALL, CommandResult
from tests.helpers.exported_programs import programs, run_programs
from tests.helpers.tiny_tasks import TINY_TASKS, write_bert_and_texts
from tuner.core.export_module import ExportModule
from tuner.core.geometry import place_on_canvas
from tuner.core.input_spec import ImageInputSpec
from tuner.core.target_scale import TargetScale
from tuner.core.types import StagedModel
from tuner.errors import SpaceError
from tuner.export import onnx_int8, pretrained
from tuner.export._readme import format_answer, read_example, transformers_program
from tuner.messages import Assignment, FinalizeJob
from tuner.training import publishing

Tuner = Callable[..., CommandResult]
BILINEAR = Image.Resampling.BILINEAR
LOSSY = ["onnx_fp16", "onnx_int8"]


def test_the_calibration_gets_one_example_after_another() -> None:
    examples = torch.arange(3 * 3 * 4 * 4).view(3, 3, 4, 4).float()
    reader = onnx_int8.CalibrationReader(examples)
    given = [reader.get_next() for _ in range(4)]
    assert given[3] is None
    assert torch.equal(
        torch.cat([torch.from_numpy(one["image"]) for one in given[:3] if one]), examples
    )


def test_a_format_that_loses_more_than_a_point_is_left_out(tmp_path: Path) -> None:
    tiny = TINY_TASKS["classification"]
    run = tiny.make_run(tmp_path)
    context = tiny.prepare(run, tmp_path, "cpu")
    model = ExportModule(context.staged_model, context.dataset.input_spec).eval()
    settings: Any = None
    job = FinalizeJob(Assignment(run, "accuracy", settings, ""), (), "", "tiny", 0)
    scorer = publishing.ValidationScorer(job, model, context.dataset, context.task)
    entry: dict[str, Any] = {}
    with torch.no_grad():
        assert scorer.compare(entry, model) is None
        assert entry["validation_score"] == entry["model_validation_score"] == scorer.score(model)
        assert (entry["allowed_loss"], entry["validation_examples"]) == (
            0.01,
            len(context.dataset.valid),
        )
        scorer.of_model = 0.9
        problem = scorer.compare({}, lambda x: model(x).roll(1, 1))
    assert problem is not None
    assert re.fullmatch(
        r"its validation accuracy is 0\.\d{4}, and the model's 0\.9000 \(allowed: 0\.0100 less\)",
        problem,
    )


@pytest.mark.parametrize(
    ("metric", "of_model", "of_format", "is_published"),
    [
        ("rmse", 0.002, 0.004, False),  # of targets such as millimetres that are told in metres
        ("rmse", 0.002, 0.00201, True),
        ("log_loss", 0.002, 0.004, True),
        ("rmse", 30.0, 31.0, False),
    ],
)
def test_an_error_in_the_units_of_the_targets_is_no_share(
    metric: str, of_model: float, of_format: float, is_published: bool
) -> None:
    scorer = publishing.ValidationScorer.__new__(publishing.ValidationScorer)
    scorer.metric, scorer.sign, scorer.of_model, scorer.count = metric, -1, of_model, 10
    scorer.score = lambda function: of_format  # type: ignore[method-assign]
    assert (scorer.compare({}, lambda x: x) is None) == is_published


class TwoHeads(nn.Module):
    """Takes the mean of two classifiers, as timm's distilled models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.head_dist = nn.Linear(12, 3), nn.Linear(12, 3)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = (self.head(x.flatten(1)) + self.head_dist(x.flatten(1))) / 2
        return mean


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), TwoHeads()])
@pytest.mark.parametrize("temperature", [None, 1.7])
def test_what_an_export_does_to_outputs_is_folded_into_the_last_layer_and_taken_out_again(
    model: nn.Module, temperature: float | None
) -> None:
    spec = ImageInputSpec(2, 2, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    scale = TargetScale((100.0, 5.0, 0.1), (20.0, 2.0, 0.01)) if temperature is None else None
    module = ExportModule(StagedModel(model, {"all": model}), spec, temperature, scale).eval()
    x = torch.rand(4, 3, 2, 2)
    before = module(x)
    with pretrained.outputs_folded_in(model, module):
        assert torch.allclose(model((x - 0.5) / 0.2), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(module(x), before)


def test_a_layer_without_a_bias_cannot_give_the_units_of_targets() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False))
    spec = ImageInputSpec(2, 2, "bilinear", (0.5,) * 3, (0.2,) * 3)
    scale = TargetScale((1.0,), (2.0,))
    module = ExportModule(StagedModel(model, {"all": model}), spec, None, scale)
    with (
        pytest.raises(SpaceError, match="no bias"),
        pretrained.outputs_folded_in(model, module),
    ):
        pass


def manifest_of(task: str) -> dict[str, Any]:
    preprocess = {"kind": "tokens", "length": 8, "leaves": ["input_ids", "attention_mask"]}
    return {"run": {"task": {"name": task}}, "classes": ["O", "B-PER"], "preprocess": preprocess}


def said_by(line: str, **values: Any) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(line, {"np": np, **values})
    return said.getvalue().rstrip("\n")


@pytest.mark.parametrize(
    ("task", "output", "answer"),
    [
        ("text_classification", [[0.0, 1.0]], "B-PER 0.7311"),
        ("token_classification", [[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]], "['B-PER', 'O', 'B-PER']"),
        ("multilabel", [[0.0, 200.0]], "{'O': 0.5, 'B-PER': 1.0}"),
        ("text_regression", [[3.5, -2.0]], "{'O': 3.5, 'B-PER': -2.0}"),
        ("segmentation", [[[[0.0, 3.0]], [[1.0, 2.0]]]], "{'O': 1, 'B-PER': 1}"),
        ("own.module:Task", [[1.0]], "[(1, 1)]"),
    ],
)
def test_the_last_line_of_a_program_says_what_the_output_means(
    task: str, output: Any, answer: str
) -> None:
    line = format_answer(manifest_of(task) | {"output_names": ["output"]})
    assert said_by(line, output=np.array(output)) == answer


def test_the_last_line_of_a_detectors_program_names_what_is_likelier_than_not() -> None:
    boxes = [[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [0.0] * 4]]
    values = {"boxes": boxes, "scores": [[0.75, 0.25, 0.0]], "labels": [[1, 0, -1]]}
    arrays = {name: np.array(value) for name, value in values.items()}
    said = said_by(format_answer(manifest_of("detection") | {"output_names": [*values]}), **arrays)
    assert said == "[('B-PER', 0.75, [0.0, 1.0, 2.0, 3.0])]"


@pytest.mark.parametrize(
    ("task", "kind", "answer"),
    [
        ("text_classification", "SequenceClassification", "B-PER"),
        ("token_classification", "TokenClassification", "['B-PER', 'O']"),
        ("text_regression", "SequenceClassification", "{'O': 0.5, 'B-PER': 2.0}"),
    ],
)
def test_the_program_of_a_pretrained_folder_is_that_of_its_task(
    task: str, kind: str, answer: str
) -> None:
    program = transformers_program(manifest_of(task))
    assert f"import AutoModelFor{kind}\n" in program
    logits = torch.tensor([[0.5, 2.0]])
    if task == "token_classification":
        logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    assert said_by(program.splitlines()[-1], logits=logits) == answer


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("size", [(41, 97), (97, 41), (64, 64)])
def test_a_program_prepares_an_image_as_tuner_does(
    fit: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    spec = ImageInputSpec(32, 37, "bilinear", (0.5,) * 3, (0.2,) * 3, fit=fit)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    place = place_on_canvas(*size, spec)
    canvas = Image.new("RGB", (32, 32), (114, 114, 114))
    canvas.paste(image.resize((place.width, place.height), BILINEAR), (place.left, place.top))
    program = read_example(spec.to_dict()).replace("image.jpg", str(tmp_path / "image.png"))
    prepared: dict[str, Any] = {"Image": Image, "ImageOps": ImageOps}
    exec(program, prepared)
    assert prepared["image"].tobytes() == canvas.tobytes()


def test_formats_are_named_and_those_that_cannot_hold_a_model_are_refused(
    tuner: Tuner, small: Path
) -> None:
    said = tuner("check", small, "export=[pretrained]")
    assert said.code == 2 and "export.0: pretrained cannot hold resnet18_slim" in said.err
    assert tuner("check", small, "export=[onnx_fp16,onnx_int8,openvino]").code == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_readme_loads_its_formats_without_tuner(
    tuner: Tuner, studied: Path, tmp_path: Path
) -> None:
    """All formats of a model, and each program of the README says what `tuner predict` says."""
    pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    wanted = ["torch_export", "onnx", *LOSSY, "openvino"]
    said = tuner("export", "small", *(word for name in wanted for word in ("--format", name)))
    assert said.code == 0, said.err
    export = studied / "export"
    manifest = json.loads((export / "manifest.json").read_text())
    kept = set(manifest["exports"]) | set(manifest["left_out"])
    assert kept == {"safetensors", *wanted}
    assert all(1 <= entry["calls"] <= 30 for entry in manifest["exports"].values())
    assert manifest["measured"]["machine"]
    sizes = {name: entry["megabytes"] for name, entry in manifest["exports"].items()}
    assert all(size < sizes["onnx"] for name, size in sizes.items() if name in LOSSY)
    image = export / "image.jpg"
    pixels = np.random.default_rng(0).normal(128, 40, (40, 50, 3))  # the same in every run
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(image)
    answer = json.loads(tuner("predict", "small", image, "--json").out)["classes"]
    best = max(answer, key=answer.get)
    written = list(programs(export))
    assert set(written) == set(manifest["exports"]) - {"safetensors"}
    for name, line in zip(written, run_programs(export, *written), strict=True):
        said_class, probability = line.split()
        assert abs(float(probability) - answer[said_class]) < (0.25 if name in LOSSY else 2e-3), (
            name
        )
        assert said_class == best or name in LOSSY


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_a_pretrained_folder_is_loaded_by_its_library_alone(
    tuner: Tuner, tmp_path: Path, name: str
) -> None:
    """With the temperature in its last layer: the program of the README says what the ONNX file says."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
    if name == "timm":
        space = SMALL.replace(
            "{name: resnet18_slim, weights: bundled}", "{name: timm/resnet10t, weights: none}"
        ).partition("recipe:")[0]
        space += "recipe: {epochs: 1, batch_size: 16}\n"
    else:
        write_bert_and_texts(tmp_path)
        space = f"task: text_classification\ndata: {{name: text, path: {tmp_path}/texts.csv}}\nmodel: {{name: bert, folder: {tmp_path}/bert, length: 16}}\nrecipe: {{epochs: 1, batch_size: 8}}\n"
    (tmp_path / "p.yaml").write_text(
        f"{space}engine: {{name: inline, device: cpu}}\nsearch: {{calibrate: 1.7}}\nexport: [onnx, pretrained]\n"
    )
    said = tuner("train", "p.yaml", "--out", "out")
    assert said.code == 0, said.err
    export = tmp_path / "out"
    manifest = json.loads((export / "manifest.json").read_text())
    assert manifest["exports"]["pretrained"]["largest_difference"] < 1e-3
    Image.effect_noise((50, 40), 90).convert("RGB").save(export / "image.jpg")
    by_onnx, by_library = run_programs(export, "onnx", "pretrained")
    assert by_onnx.split()[0] == by_library

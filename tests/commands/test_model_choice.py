"""`tuner models --for DATA`: LogME is the evidence, models are ranked by what their features say, and the best are written into a space file."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CommandResult
from tuner.commands import model_choice
from tuner.commands.data_scan import scan_data
from tuner.commands.models_space import by_condition, format_models_space
from tuner.config import parsing, yaml_document
from tuner.training.model_scores import column_evidence, logme

Tuner = Callable[..., CommandResult]


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Noisy images of three colours, in a folder for each."""
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        folder = tmp_path / "coloured" / name
        folder.mkdir(parents=True)
        for i in range(16):
            pixels = random.integers(0, 120, (32, 32, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "coloured"


def dense_evidence(features: torch.Tensor, y: torch.Tensor, alpha: float, beta: float) -> float:
    """log N(y; 0, I / beta + F F' / alpha)."""
    covariance = torch.eye(len(y), dtype=torch.float64) / beta + features @ features.T / alpha
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance)
    return float(normal.log_prob(y))


@pytest.mark.parametrize("width", [5, 60])  # fewer features than examples, and more
def test_logme_is_the_highest_evidence_of_a_bayesian_linear_model(width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, generator=generator, dtype=torch.float64)
    y = features[:, 0] - 2 * features[:, 1] + 0.5 * noise
    grid = torch.logspace(-2, 2, 41).tolist()
    best = max(dense_evidence(features, y, a, b) for a, b in itertools.product(grid, grid))
    found = logme(features, y[:, None]) * 40
    assert best - 1e-3 <= found <= best + 0.5  # the grid misses the top by little
    u, s, _ = torch.linalg.svd(features, full_matrices=False)
    assert column_evidence(s.square(), u.T @ y, float(y.square().sum()), 40) == pytest.approx(found)


def test_features_that_say_more_have_more_evidence() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(90) % 3
    columns = torch.nn.functional.one_hot(labels, 4).double()  # the last class has no example
    noise = torch.randn(90, 8, generator=generator)
    scores = [
        logme(noise + strength * columns @ torch.eye(4, 8).double(), columns)
        for strength in (0, 1, 3)
    ]
    assert scores == sorted(scores) and scores[0] < scores[2]


def test_models_are_ranked_and_the_best_are_written(
    coloured: Path, tmp_path: Path, tuner: Tuner
) -> None:
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    result = tuner(
        "models", "--for", coloured, "--among", "resnet18_slim,alexnet", "--weights",
        f"alexnet={tmp_path / 'other.pth'}", "--write", tmp_path / "chosen.yaml",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "alexnet: left out: " in result.out and "other.pth" in result.out
    line = next(line for line in result.out.splitlines() if line.startswith("resnet18_slim "))
    assert "first choice, generalist" in line and float(line.split()[1]) > 0.5
    checked = tuner("check", tmp_path / "chosen.yaml")
    assert checked.code == 0, checked.err
    again = tuner(
        "models", "--for", coloured, "--among", "resnet18_slim", "--write", tmp_path / "chosen.yaml"
    )
    assert again.code == 2 and "is there already" in again.err


def test_without_time_no_model_is_begun(coloured: Path, tmp_path: Path) -> None:
    (reading,) = scan_data(str(coloured))
    (model,) = model_choice.score_models(reading, ["resnet18_slim"], {}, tmp_path, -1.0)
    assert model.score is None and "--time" in model.reason


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "nowhere"], "nowhere"),
        (["--for", "{data}", "--among", "resnet8"], "'resnet8' is no model"),
        (["--for", "{data}", "--among", "bert"], "none of bert is for classification"),
        (["--for", "{data}", "--weights", "resnet50"], "expected MODEL=FILE"),
        (["--for", "{data}", "--weights", "resnet50=gone.pth"], "there is no gone.pth"),
        (["--for", "{data}", "--time", "soon"], "expected a duration"),
        (["--write", "x.yaml"], "--write is for scoring models on data"),
        (["resnet50", "--for", "{data}"], "named by --among"),
    ],
)
def test_wrong_options_say_what_is_right(
    words: list[str], message: str, coloured: Path, tuner: Tuner
) -> None:
    result = tuner("models", *(word.replace("{data}", str(coloured)) for word in words))
    assert result.code in (2, 3) and message in result.err


def test_a_space_of_several_models_has_ranges_and_weights_for_each(coloured: Path) -> None:
    (reading,) = scan_data(str(coloured))
    models = {"timm/vit_tiny_patch16_224": None, "resnet18": "own.pth", "resnet50": None}
    text = format_models_space(reading, models, Path(), gpu=False)
    space = parsing.parse_space(yaml_document.parse_document(text, "chosen.yaml"))
    names = {d.name for d in space.dimensions}
    assert {
        "model.name",
        "freeze",
        "lr[timm/vit_tiny_patch16_224]",
        "lr[resnet18|resnet50]",
    } <= names
    by_model = {
        d.condition["model", "name"]: d.domain for d in space.dimensions if "weights" in d.name
    }
    assert {models: domain.values() for models, domain in by_model.items()} == {
        ("timm/vit_tiny_patch16_224", "resnet50"): ("default",),
        ("resnet18",): ("own.pth",),
    }
    assert by_condition({"a": 1, "b": 1}, "model", lambda v: {"choices": [v]}) == 1


def test_the_generalist_is_the_best_on_imagenet() -> None:
    assert model_choice.published_accuracies(["resnet18", "resnet50", "resnet18_slim"]) == {
        "resnet18": pytest.approx(69.758),
        "resnet50": pytest.approx(80.858),
    }

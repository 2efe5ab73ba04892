"""Heat maps lie where the class is, and every kind of feature becomes a map."""

import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import CommandResult
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import StagedModel
from tuner.errors import SpaceError
from tuner.training.explained_examples import choose_examples
from tuner.training.heat_maps import as_maps, draw_heat_map, heat_maps

SPEC = ImageInputSpec(16, 16, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def colour_detector() -> ExportModule:
    """Class 0 is the mean of red, class 1 that of blue, of features with half the side."""
    convolution = nn.Conv2d(3, 3, 2, stride=2, groups=3, bias=False)
    nn.init.constant_(convolution.weight, 0.25)
    linear = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(OrderedDict(body=convolution, pool=pooling, head=linear))
    staged = StagedModel(model, dict(model.named_children()))
    return ExportModule(staged, SPEC).eval()


def test_the_heat_is_where_the_class_is() -> None:
    x = torch.zeros(2, 3, 16, 16)
    x[:, 0, :8, :8] = 1  # red at the upper left, blue at the lower right
    x[:, 2, 8:, 8:] = 1
    red, blue = heat_maps(colour_detector(), x, torch.tensor([0, 1]))
    assert red.shape == (16, 16) and red[:6, :6].min() > 0.9 and red[10:, 10:].max() == 0
    assert blue[10:, 10:].min() > 0.9 and blue[:6, :6].max() == 0
    drawn = Image.open(io.BytesIO(draw_heat_map(torch.zeros(3, 16, 16), red)))
    assert drawn.getpixel((2, 2))[0] > 100 and drawn.getpixel((13, 13)) == (0, 0, 0)  # type: ignore[index]


def test_patches_are_a_square_and_tokens_before_them_are_left_out() -> None:
    tokens = torch.arange(2 * 5 * 3).view(2, 5, 3).float()
    maps = as_maps(tokens)
    assert maps.shape == (2, 3, 2, 2)
    assert torch.equal(maps[0, :, 0, 0], tokens[0, 1]) and torch.equal(
        maps[0, :, 1, 1], tokens[0, 4]
    )


def test_a_model_without_a_feature_map_has_no_heat_map() -> None:
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), head=nn.Linear(768, 2)))
    module = ExportModule(StagedModel(model, dict(model.named_children())), SPEC).eval()
    with pytest.raises(SpaceError, match="no feature map"):
        heat_maps(module, torch.zeros(1, 3, 16, 16), torch.tensor([0]))


def test_predict_draws_them(
    tuner: Callable[..., CommandResult], studied: Path, tmp_path: Path
) -> None:
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "a.png")
    said = tuner("predict", "small", "a.png", "--explain")
    assert said.code == 0 and said.out.endswith("-> predictions/0000-a.png\n")
    with Image.open(tmp_path / "predictions" / "0000-a.png") as drawn:
        assert drawn.size == (32, 32) and drawn.mode == "RGB"
    (tmp_path / "predictions" / "0000-a.png").unlink()
    said = tuner("predict", "small", "a.png", "--csv", "out.csv", "--explain")
    assert said.out == "wrote out.csv and 1 picture in predictions\n"
    assert (tmp_path / "predictions" / "0000-a.png").is_file()
    said = tuner("predict", "small", "a.png", "--explain", "--format", "onnx")
    assert said.code == 2


def test_shown_are_the_surest_mistakes_and_right_answers_of_all_classes() -> None:
    truth = [0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 1]
    predicted = [0, 0, 0, 1, 1, 2, 1, 0, 1, 1, 2, 0]
    confidence = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.99, 0.98, 0.97, 0.5, 0.45, 0.4]
    assert choose_examples(truth, predicted, confidence) == [6, 7, 8, 9, 0, 3, 5, 1]
    assert choose_examples([0, 1], [0, 1], [0.6, 0.7]) == [1, 0]
    assert choose_examples([0, 1], [1, 0], [0.6, 0.7]) == [1, 0]

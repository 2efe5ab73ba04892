"""The mean over an image and its mirror image: of classes, of masks, and of nothing else."""

import pytest
import torch
from torch import Tensor, nn

from tuner.config import parsing, plugins, yaml_document
from tuner.config.run import Recipe
from tuner.core.input_spec import TensorTree
from tuner.core.output_modules import FlippedPair, require_flips
from tuner.core.types import Task
from tuner.errors import SpaceError
from tuner.tasks import classification, detection, segmentation, text_classification

X = torch.arange(24.0).view(1, 3, 2, 4)


class Ramp(nn.Module):
    """Gives each pixel a logit that depends on its column, as a mask, or `out` and `aux`."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> TensorTree:
        mask = x[:, :2] * torch.arange(4)
        return dict.fromkeys(self.names, mask) if self.names else mask


def test_a_mask_is_mirrored_back() -> None:
    task = segmentation.build(("a", "b"), Recipe())
    # column c has the weight c as it is, and 3 - c in the mirror image
    expected = X[:, :2] * torch.full((4,), 1.5)
    found = FlippedPair(Ramp(), task.mirror_output)(X)
    assert isinstance(found, Tensor) and torch.equal(found, expected)
    named = FlippedPair(Ramp("out", "aux"), task.mirror_output)(X)
    assert isinstance(named, dict) and set(named) == {"out", "aux"}
    assert torch.equal(named["out"], expected) and torch.equal(named["aux"], expected)
    predicted = task.predict(FlippedPair(Ramp(), task.mirror_output), X)
    assert isinstance(predicted, Tensor) and predicted.shape == (1, 2, 4)


def test_of_classes_the_logits_are_averaged() -> None:
    task = classification.build(("a", "b"), Recipe())
    net = nn.Sequential(Ramp(), nn.Flatten(), nn.Linear(16, 2))
    logits = FlippedPair(net, task.mirror_output)(X)
    assert torch.equal(logits, (net(X) + net(X.flip(-1))) / 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [detection, text_classification])
def test_boxes_and_texts_have_no_mean(module: object) -> None:
    task = module.build(("a", "b"), Recipe())  # type: ignore[attr-defined]
    with pytest.raises(
        SpaceError, match=r"--flips: .* has no flips: only outputs that are numbers"
    ):
        require_flips(task, "--flips")


def test_a_task_names_the_keys_that_its_class_has() -> None:
    for name in plugins.list_names("task"):
        task = plugins.load_plugin("task", name)(("a", "b"), Recipe())
        keys = plugins.read_task_names(name, "SEARCH_KEYS")
        has_flips = type(task).mirror_output is not Task.mirror_output
        has_temperature = type(task).fit_temperature is not Task.fit_temperature
        assert (("test_flips" in keys), ("calibrate" in keys)) == (has_flips, has_temperature)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("calibrate: 0", "search.calibrate: must be above 0, got 0"),
        ("calibrate: temp", "search.calibrate: expected a number, temperature or none, got the string 'temp'"),
        ("calibrate: 1.5", "search.calibrate: 1.5, but segmentation has no such key, only classification, multilabel, text_classification or text_multilabel: a temperature divides the logits of examples that have classes or labels as a whole; drop the key"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_file_is_said_where_it_is(words: str, expected: str) -> None:
    text = f"task: segmentation\ndata: {{name: masks, path: x}}\nmodel: fcn_resnet50\nsearch: {{{words}}}\n"
    with pytest.raises(SpaceError) as caught:
        parsing.parse_space(yaml_document.parse_document(text, "space.yaml"))
    assert caught.value.problems == (f"space.yaml:4: {expected}",)


def test_flips_of_boxes_are_refused_in_the_file() -> None:
    text = "task: detection\ndata: {name: coco, path: x}\nmodel: retinanet_resnet50_fpn\nsearch: {test_flips: true}\n"
    with pytest.raises(
        SpaceError, match=r"search\.test_flips: true, but detection has no such key"
    ):
        parsing.parse_space(yaml_document.parse_document(text, "space.yaml"))

"""What detectors share beside the laws: names in the digests of stages, and the scale of the features that a head gets."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.detector_families import SMALL_DETECTORS, adapt_statistics, build_detector
from tuner.core.types import StagedModel
from tuner.training.frozen_prefix import stage_digests

BACKBONE = "timm/mobilenetv3_small_050"


def digests(staged: StagedModel) -> dict[str, str]:
    found = stage_digests(list(staged.stages.values()), "start")
    return dict(zip(staged.stages, found, strict=True))


def test_stages_that_pass_other_feature_maps_on_share_no_cached_activations() -> None:
    """Over equal layers Faster R-CNN takes maps from stride 4 on, RetinaNet from 8 on, both by the names 0, 1, 2."""
    pytest.importorskip("timm")
    first, second = (
        build_detector(f"fasterrcnn/{BACKBONE}"),
        build_detector(f"retinanet/{BACKBONE}"),
    )
    a, b = digests(first), digests(second)
    x = torch.rand(1, 3, 64, 64)
    for depth, name in enumerate(list(first.stages)[:-2], 1):
        outputs = [staged.split(depth)[0](x) for staged in (first, second)]
        alike = outputs[0].keys() == outputs[1].keys() and all(
            torch.equal(value, outputs[1][key]) for key, value in outputs[0].items()
        )
        assert (a[name] == b[name]) == alike, name
    assert a["stem"] == b["stem"]


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_pyramid_over_a_backbone_of_timm_has_one_scale(scale: float) -> None:
    """Rates are meant for features of a ResNet's size; those of EfficientNet-Lite0 are ten times as large."""
    pytest.importorskip("timm")
    staged = build_detector(f"fasterrcnn/{BACKBONE}")
    backbone, _ = staged.split(staged.max_depth - 1)
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    adapt_statistics(backbone, x)
    with torch.no_grad():
        maps = {
            name: scale * value if value.is_floating_point() else value
            for name, value in backbone(x).items()
        }
        pyramid = staged.stages["fpn"].eval()(maps)
    for name in ("0", "1", "2", "3"):
        assert 0.5 < float(pyramid[name].std()) < 2, name


# the probability of an object with which each author's new class layer begins, and the layer
PRIORS = {
    "retinanet_resnet50_fpn": (0.01, "cls_logits"),
    "fcos_resnet50_fpn": (0.01, "cls_logits"),
    "retinanet/timm/mobilenetv3_small_050": (0.01, "cls_logits"),
    "fcos/timm/mobilenetv3_small_050": (0.01, "cls_logits"),
    "rtdetr_r18": (0.01, "class_embed"),
    "dfine_n": (0.01, "class_embed"),
    "yolox_nano": (0.01, "cls_preds"),
    "yolov9_t": (1 / (1 + math.exp(10)), "head.cv3"),
}
# their class layer is a softmax with a class for the background, for which the authors have no prior
SOFTMAX_DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn/timm/mobilenetv3_small_050",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
}
LARGE_DETECTORS = {"retinanet_resnet50_fpn", "fcos_resnet50_fpn", "rtdetr_r18"}


def class_biases(model: nn.Module, name: str, classes: int) -> list[Tensor]:
    """The biases of the layers whose outputs are the classes, for RetinaNet those of 9 anchors."""
    _, layer = PRIORS[name]
    return [
        value
        for key, value in model.named_parameters()
        if layer in key and key.endswith("bias") and len(value) in (classes, 9 * classes)
    ]


def test_every_detector_has_a_prior_or_a_softmax() -> None:
    assert set(PRIORS) | SOFTMAX_DETECTORS == set(SMALL_DETECTORS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LARGE_DETECTORS else ()) for n in PRIORS],
)
def test_a_new_class_layer_begins_with_its_authors_prior_whatever_is_loaded(
    name: str, tmp_path: Path
) -> None:
    """Lin et al., Focal Loss for Dense Object Detection, section 3.3: bias -log((1 - prior) / prior)."""
    trained = build_detector(name, 5)
    for value in class_biases(trained.model, name, 5):
        value.data.fill_(3.0)
    file = tmp_path / "five.safetensors"
    save_file({k: v.clone().contiguous() for k, v in trained.model.state_dict().items()}, file)
    prior, _ = PRIORS[name]
    for classes, weights in ((1, "none"), (3, "none"), (3, str(file))):
        biases = class_biases(build_detector(name, classes, weights=weights).model, name, classes)
        assert biases
        for bias in biases:
            expected = torch.full_like(bias, prior)
            assert torch.allclose(bias.sigmoid(), expected, rtol=1e-3), (classes, weights)

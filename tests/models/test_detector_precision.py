"""Detectors under bfloat16 autocast: boxes, losses and scores are those of float32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from tests.helpers.detector_families import (
    SMALL_DETECTORS,
    adapt_statistics,
    build_detector,
    list_detector_families,
    look_at_few_regions,
)
from tuner.config import plugins
from tuner.config.run import Recipe
from tuner.core.detectors import join_targets
from tuner.core.targets import NO_OBJECT
from tuner.tasks.detection import build

SIDE = 288  # pixels of a canvas; above 256 the bfloat16 numbers are 2 apart
TARGETS = {
    "boxes": torch.tensor(
        [[[4.0, 6, 36, 40], [100, 110, 260, 281]], [[210, 212, 250, 260], [0, 0, 0, 0]]]
    ),
    "labels": torch.tensor([[0, 2], [1, NO_OBJECT]]),
}


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def with_bfloat16_maps(activations: dict[str, Tensor]) -> dict[str, Tensor]:
    """As autocast gives them: many CPUs take a minute for the convolutions of a backbone in bfloat16."""
    return {k: v.bfloat16() if v.dim() == 4 else v for k, v in activations.items()}


def test_every_family_is_in_the_table() -> None:
    assert {plugins.find_model_family(name) for name in SMALL_DETECTORS} == list_detector_families()


# for their heads a smaller backbone or a sister stands in the quick tests
LARGE = (
    "dfine_n",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "retinanet/timm/mobilenetv3_small_050",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else [])
        for name in SMALL_DETECTORS
    ],
)
def test_a_head_computes_in_float32_under_autocast(name: str) -> None:
    """On the same activations the objects and losses under autocast are those without, to the bit."""
    staged = build_detector(name)
    look_at_few_regions(staged.model)
    x = 255 * torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    prefix, head = staged.split(staged.max_depth)
    adapt_statistics(prefix, x)
    be_unsure(head)
    with torch.no_grad():
        activations = with_bfloat16_maps(prefix(x))
    exact = {k: v.float() if v.is_floating_point() else v for k, v in activations.items()}

    with torch.no_grad():
        expected = head.eval()(exact)
        with bfloat16():
            got = head(activations)
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    inside = got["boxes"][(got["boxes"] > 128) & (got["boxes"] < SIDE)]
    assert got["boxes"].dtype == torch.float32 and len(inside) > 8
    assert bool((inside % 1 != 0).any())  # bfloat16 has integers alone from 128 on

    def losses(given: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(1)
        found: dict[str, Tensor] = head.train()(join_targets(given, TARGETS))
        return found

    without = losses(exact)
    with bfloat16():
        within = losses(activations)
    assert all(torch.equal(within[key], value) for key, value in without.items())
    with bfloat16():
        sum(within.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in head.parameters())


def be_unsure(head: nn.Module) -> None:
    """Takes back the priors by which a new class layer begins: without them there are objects to look at."""
    for key, value in head.named_parameters():
        if key.endswith("bias") and bool((value < -2).all()):
            nn.init.zeros_(value)


# -- down to the score: heads that know the truth, behind torchvision's own decoding and suppression

CANVAS = 800
IMAGES, OBJECTS = 2, 6


def make_truth() -> tuple[Tensor, Tensor]:
    """Boxes of 12 to 64 pixels, (IMAGES, OBJECTS, 4), one in each cell of 3 x 2, and their labels: all of one class."""
    generator = torch.Generator().manual_seed(4)
    sides = 12 + 52 * torch.rand(IMAGES, OBJECTS, 2, generator=generator)
    cells = torch.tensor([[x, y] for x in range(3) for y in range(2)]) * torch.tensor([266.0, 400])
    left_top = cells + torch.rand(IMAGES, OBJECTS, 2, generator=generator) * 200
    return torch.cat([left_top, left_top + sides], -1), torch.zeros(IMAGES, OBJECTS).long()


def nearest(boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """For each anchor the true box with which it overlaps most, and by how much."""
    overlaps, matches = box_iou(anchors, boxes).max(1)
    return boxes[matches], overlaps


class KnowingHead(nn.Module):
    """A one-stage head that gives each anchor the true box nearest to it, and the more certainty the nearer, in the type
    that a layer would give."""

    def __init__(self, model: Any, boxes: Tensor) -> None:
        super().__init__()
        self.anchors, self.coder, self.boxes = model.anchor_generator, model.box_coder, boxes

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        images = ImageList(torch.zeros(IMAGES, 3, CANVAS, CANVAS), [(CANVAS, CANVAS)] * IMAGES)
        anchors = self.anchors(images, [level.float() for level in levels])
        codes, scores = [], []
        for image_anchors, boxes in zip(anchors, self.boxes, strict=True):
            matched, overlaps = nearest(boxes, image_anchors)
            if isinstance(self.coder, BoxLinearCoder):
                codes.append(self.coder.encode(image_anchors, matched))
            else:
                codes.append(self.coder.encode([matched], [image_anchors])[0])
            scores.append(10 * overlaps[:, None] - 5)
        type_ = layer_type(levels[0])
        logits = torch.stack(scores).to(type_)
        result = {"bbox_regression": torch.stack(codes).to(type_), "bbox_ctrness": logits}
        return result | {"cls_logits": logits}


class KnowingProposals(nn.Module):
    """Instead of the layers of the region proposal network."""

    def __init__(self, rpn: Any, boxes: Tensor) -> None:
        super().__init__()
        self.anchors, self.coder, self.boxes = rpn.anchor_generator, rpn.box_coder, boxes

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        images = ImageList(torch.zeros(IMAGES, 3, CANVAS, CANVAS), [(CANVAS, CANVAS)] * IMAGES)
        found = [
            nearest(boxes, anchors)
            for boxes, anchors in zip(
                self.boxes, self.anchors(images, [level.float() for level in levels]), strict=True
            )
        ]
        anchors = self.anchors(images, [level.float() for level in levels])
        codes = torch.stack(self.coder.encode([matched for matched, _ in found], anchors))
        scores = torch.stack([10 * overlaps - 5 for _, overlaps in found])
        per_place = len(anchors[0]) // sum(level[0, 0].numel() for level in levels)
        sizes = [per_place * level[0, 0].numel() for level in levels]
        objectness, deltas = [], []
        for level, part, code in zip(
            levels, scores.split(sizes, 1), codes.split(sizes, 1), strict=True
        ):
            h, w = level.shape[-2:]
            objectness.append(part.reshape(IMAGES, h, w, per_place).permute(0, 3, 1, 2))
            deltas.append(code.reshape(IMAGES, h, w, 4 * per_place).permute(0, 3, 1, 2))
        type_ = layer_type(levels[0])
        return [o.to(type_) for o in objectness], [d.to(type_) for d in deltas]


class KnowingRegions(nn.Module):
    """Instead of pooling, fully connected layers and predictor of the second stage."""

    def __init__(self, coder: Any, boxes: Tensor) -> None:
        super().__init__()
        self.coder, self.boxes = coder, boxes

    def forward(
        self, levels: dict[str, Tensor], proposals: list[Tensor], _: Any
    ) -> tuple[Tensor, Tensor]:
        logits, codes = [], []
        for regions, boxes in zip(proposals, self.boxes, strict=True):
            matched, overlaps = nearest(boxes, regions.float())
            code = self.coder.encode([matched], [regions.float()])[0]
            codes.append(torch.cat([torch.zeros_like(code), code], 1))
            logits.append(torch.stack([torch.zeros_like(overlaps), 10 * overlaps - 5], 1))
        type_ = layer_type(next(iter(levels.values())))
        return torch.cat(logits).to(type_), torch.cat(codes).to(type_)


def layer_type(features: Tensor) -> torch.dtype:
    """What a convolution of these features would give."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else features.dtype


def teach(name: str, model: Any, head: Any, boxes: Tensor) -> None:
    """Replaces the layers of a head by some that know the true boxes."""
    if name.startswith("fasterrcnn"):
        head.rpn.head = KnowingProposals(head.rpn, boxes)
        head.roi_heads.box_roi_pool = KnowingRegions(head.roi_heads.box_coder, boxes)
        head.roi_heads.box_head = head.roi_heads.box_predictor = Unchanged()
    else:
        head.head = KnowingHead(model, boxes)


class Unchanged(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "retinanet/timm/mobilenetv3_small_050",
        "fcos/timm/mobilenetv3_small_050",
    ],
)
def test_the_average_precision_of_small_objects_is_that_of_float32(name: str) -> None:
    """Small objects right and below on a large canvas, which bfloat16 boxes would miss by up to 4 pixels."""
    staged = build_detector(name, outputs=1)
    prefix, head = staged.split(staged.max_depth)
    boxes, labels = make_truth()
    teach(name, staged.model, list(staged.stages.values())[-1], boxes)
    scores = {}
    with torch.no_grad():
        exact = prefix(torch.zeros(IMAGES, 3, CANVAS, CANVAS))
    for precision, maps in (("float32", exact), ("bfloat16", with_bfloat16_maps(exact))):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
            found = head.eval()(maps)
        task: Any = build(("thing",), Recipe())
        scores[precision] = task.score([(found, {"boxes": boxes, "labels": labels})])["map"]
    assert scores["float32"] > 0.9
    assert scores["bfloat16"] == pytest.approx(scores["float32"], abs=0.01)

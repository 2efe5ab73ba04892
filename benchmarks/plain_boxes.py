"""Boxes as torchvision's references/detection trains them: Faster R-CNN, SGD, steps, flips; lr searched by Optuna.

    python benchmarks/plain_boxes.py FOLDER --weights lite0.safetensors --predictions OUT.json --size 160 --epochs 6 [--trials 3]

The first trial has the numbers of the reference: lr 0.02 for 16 images, which is 0.0025 for batches of 2; momentum 0.9, weight
decay 1e-4, lr rises during the first epoch and is divided by 10 after 16 and 22 of 26 epochs (here: of those given), images
mirrored by half, three of five stages of the backbone trained, its BatchNorm frozen. The others search lr and the stages
trained. The pyramid has GroupNorm, because without it these rates diverge on EfficientNet-Lite0. Weights of the best epoch by
mAP 50:95 on the validation images.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_search
import task_sets
import timm
import torch
from optuna import Trial
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.transforms.v2 import functional as transforms

DEFAULT = {"lr": 0.0025, "trained_stages": 3}
BATCH = 2
CHANNELS = 256


class Backbone(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights from a file, and a feature pyramid over it."""

    out_channels = CHANNELS

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.body = timm.create_model(
            task_sets.MODEL,
            features_only=True,
            out_indices=(1, 2, 3, 4),
            pretrained=True,
            pretrained_cfg_overlay={"file": str(weights)},
        )
        timm.layers.freeze_batch_norm_2d(self.body)
        self.fpn = FeaturePyramidNetwork(
            self.body.feature_info.channels(),
            CHANNELS,
            LastLevelMaxPool(),
            lambda channels: nn.GroupNorm(32, channels),
        )

    def freeze(self, trained_stages: int) -> None:
        """Trains the last so many of five stages: stem, then one for each halving of the image."""
        blocks = self.body.blocks
        stages = [
            [self.body.conv_stem, blocks[0]],
            [blocks[1]],
            [blocks[2]],
            [blocks[3], blocks[4]],
            [blocks[5], blocks[6]],
        ]
        for stage in stages[: len(stages) - trained_stages]:
            for module in stage:
                module.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): level for i, level in enumerate(self.body(x))})


class Boxes(Dataset):
    """The images of a part, float32 (3, height, width) in 0..1, and their objects as torchvision wants them."""

    def __init__(self, folder: Path, part: str, *, mirror: bool = False) -> None:
        self.images = task_sets.list_boxes(folder, part)
        self.classes, self.mirror = task_sets.list_classes(folder), mirror

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        file, objects = self.images[index]
        pixels = transforms.pil_to_tensor(Image.open(file).convert("RGB")) / 255
        boxes = torch.tensor([box for _, box in objects]).view(-1, 4)
        if self.mirror and torch.rand(()) < 0.5:
            pixels, width = pixels.flip(-1), pixels.shape[-1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        labels = torch.tensor([1 + self.classes.index(name) for name, _ in objects])
        return pixels, {"boxes": boxes, "labels": labels}

    def loader(self) -> DataLoader:
        return DataLoader(self, batch_size=BATCH, shuffle=self.mirror, collate_fn=list)


def build(args: argparse.Namespace, classes: int, trained_stages: int) -> nn.Module:
    backbone = Backbone(args.weights)
    backbone.freeze(trained_stages)
    config = timm.get_pretrained_cfg(task_sets.MODEL)
    anchors = AnchorGenerator(
        tuple((side,) for side in (32, 64, 128, 256, 512)), ((0.5, 1, 2),) * 5
    )
    return FasterRCNN(
        backbone,
        classes + 1,
        min_size=args.size,  # the longer side: both limits hold
        max_size=args.size,
        image_mean=config.mean,
        image_std=config.std,
        rpn_anchor_generator=anchors,
        box_batch_size_per_image=args.regions,
        rpn_post_nms_top_n_test=args.proposals,
    )


def train(args: argparse.Namespace, params: dict[str, Any]) -> Iterator[tuple[float, nn.Module]]:
    """One training; yields mAP 50:95 on the validation images after each epoch."""
    data = Boxes(args.folder, "train", mirror=True)
    valid = Boxes(args.folder, "valid")
    model = build(args, len(data.classes), params["trained_stages"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=params["lr"], momentum=0.9, weight_decay=1e-4)
    loader = data.loader()
    warmup = min(1000, len(loader) - 1)
    steps = [round(args.epochs * share) * len(loader) for share in (16 / 26, 22 / 26)]

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.1 ** sum(step >= limit for limit in steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(args.epochs):
        model.train()
        for batch in loader:
            images, targets = zip(*batch, strict=True)
            loss = sum(model(list(images), list(targets)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield mean_average_precision(model, valid), model


@torch.inference_mode()
def mean_average_precision(model: nn.Module, data: Boxes) -> float:
    model.eval()
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    for batch in data.loader():
        images, targets = zip(*batch, strict=True)
        metric.update(model(list(images)), list(targets))
    return max(0.0, float(metric.compute()["map"]))


@torch.inference_mode()
def predictions(model: nn.Module, data: Boxes) -> dict[str, list[dict[str, Any]]]:
    """The objects of each image, in its own pixels, by the image's name without its ending."""
    model.eval()
    found = {}
    for (file, _), (pixels, _) in zip(data.images, data, strict=True):
        objects = model([pixels])[0]
        columns = (objects[name].tolist() for name in ("labels", "scores", "boxes"))
        found[file.stem] = [
            {"label": data.classes[label - 1], "score": score, "box": box}
            for label, score, box in zip(*columns, strict=True)
        ]
    return found


def suggest(trial: Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 5e-4, 2e-2, log=True),
        "trained_stages": trial.suggest_int("trained_stages", 0, 5),
    }


def main() -> None:
    parser = plain_search.arguments(__doc__)
    parser.add_argument("--regions", type=int, default=512, help="of an image, to learn from")
    parser.add_argument("--proposals", type=int, default=1000, help="of an image, when it predicts")
    args = parser.parse_args()
    model = plain_search.search(args, DEFAULT, suggest, lambda params: train(args, params))
    found = predictions(model, Boxes(args.folder, "test"))
    args.predictions.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

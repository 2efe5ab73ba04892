"""Masks as segmentation_models_pytorch's examples train them: U-Net, Adam, cosine, Dice loss; lr searched by Optuna.

    python benchmarks/plain_masks.py FOLDER --weights lite0.safetensors --predictions OUT --size 128 --epochs 10 [--trials 4]

The first trial has the numbers of its examples (binary_segmentation_intro.ipynb): lr 2e-4, batches of 16. The others search lr
and weight decay. Images are resized to a square, half of them mirrored. OUT becomes a folder of PNG masks of the test images,
at their own size, with the class of each pixel. Weights of the best epoch by mean IoU on the validation images.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import plain_search
import segmentation_models_pytorch as smp
import task_sets
import timm
import torch
import torch.nn.functional as F
from optuna import Trial
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

DEFAULT = {"lr": 2e-4, "weight_decay": 0.0}
BATCH = 16


class Masks(Dataset):
    """The images of a part, float32 (3, size, size), and their masks, int64 (size, size): 1 is foreground."""

    def __init__(self, folder: Path, part: str, size: int, *, mirror: bool) -> None:
        self.files, self.size, self.mirror = task_sets.list_masks(folder, part), size, mirror
        config = timm.get_pretrained_cfg(task_sets.MODEL)
        self.mean, self.std = list(config.mean), list(config.std)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = (Image.open(file) for file in self.files[index])
        side = (self.size, self.size)
        pixels = transforms.pil_to_tensor(
            image.convert("RGB").resize(side, Image.Resampling.BILINEAR)
        )
        truth = torch.from_numpy(np.array(mask.convert("L").resize(side, Image.Resampling.NEAREST)))
        if self.mirror and torch.rand(()) < 0.5:
            pixels, truth = pixels.flip(-1), truth.flip(-1)
        normalised = transforms.normalize(pixels / 255, self.mean, self.std)
        return normalised, (truth > 127).long()


def build(weights: Path) -> nn.Module:
    """U-Net on EfficientNet-Lite0 with ImageNet weights from a file."""
    model = smp.Unet(f"tu-{task_sets.MODEL}", encoder_weights=None, classes=2)
    missing = model.encoder.model.load_state_dict(load_file(weights), strict=False).missing_keys
    assert not missing, missing
    return model


def train(args: argparse.Namespace, params: dict) -> Iterator[tuple[float, nn.Module]]:
    """One training; yields the mean IoU on the validation images after each epoch."""
    model = build(args.weights)
    images = Masks(args.folder, "train", args.size, mirror=True)
    valid = Masks(args.folder, "valid", args.size, mirror=False)
    loader = DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), **params)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    criterion = smp.losses.DiceLoss("multiclass")
    for _ in range(args.epochs):
        model.train()
        for pixels, truth in loader:
            loss = criterion(model(pixels), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield mean_iou(model, DataLoader(valid, batch_size=BATCH)), model


@torch.inference_mode()
def mean_iou(model: nn.Module, loader: DataLoader) -> float:
    """The mean over the two classes of intersection over union, over all pixels."""
    model.eval()
    counts = torch.zeros(2, 2)
    for pixels, truth in loader:
        predicted = model(pixels).argmax(1)
        counts += torch.bincount((2 * truth + predicted).flatten(), minlength=4).view(2, 2)
    hits = counts.diagonal()
    return float((hits / (counts.sum(0) + counts.sum(1) - hits)).mean())


@torch.inference_mode()
def save_masks(model: nn.Module, args: argparse.Namespace) -> None:
    """Writes the class of each pixel of the test images as PNG."""
    model.eval()
    args.predictions.mkdir()
    test = Masks(args.folder, "test", args.size, mirror=False)
    for (file, _), (pixels, _) in zip(test.files, test, strict=True):
        width, height = Image.open(file).size
        logits = F.interpolate(model(pixels[None]), (height, width), mode="bilinear")
        mask = logits[0].argmax(0).to(torch.uint8).numpy()
        Image.fromarray(mask).save(args.predictions / f"{file.stem}.png")


def suggest(trial: Trial) -> dict:
    return {
        "lr": trial.suggest_float("lr", 1e-4, 2e-3, log=True),
        "weight_decay": trial.suggest_categorical("weight_decay", [0.0, 1e-4]),
    }


def main() -> None:
    args = plain_search.arguments(__doc__).parse_args()
    model = plain_search.search(args, DEFAULT, suggest, lambda params: train(args, params))
    save_masks(model, args)


if __name__ == "__main__":
    main()

"""The plain twin: fine-tuning as one writes it today with timm, torchvision and a loop; nothing of `tuner` in it.

`plain_optuna.py` and `plain_ray.py` search over this loop. It is meant to be what a competent person would hand in: frozen
stages get no gradients and their BatchNorms stand still, the optimizer holds only what is trained, loader processes decode
beside the training. It leaves out what needs a framework: nothing is remembered between epochs or trials.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

MODEL = "tf_efficientnet_lite0"
SIZE = 128
BATCH = 32
MAX_DEPTH = 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Params:
    lr: float
    momentum: float
    freeze_depth: int
    epochs: int


def plain_transform(size: int) -> transforms.Compose:
    """The centre of an image, `size` pixels a side, as the ImageNet weights want it."""
    wanted = timm.get_pretrained_cfg(MODEL)
    return transforms.Compose(
        [
            transforms.Resize(
                round(size / wanted.crop_pct), transforms.InterpolationMode(wanted.interpolation)
            ),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(wanted.mean, wanted.std),
        ]
    )


def loaders(folder: Path, workers: int, size: int = SIZE) -> tuple[DataLoader, DataLoader]:
    """Training and validation images of <folder>/{train,valid}/<class>."""
    transform = plain_transform(size)
    train, valid = (ImageFolder(str(folder / part), transform) for part in ("train", "valid"))
    return (
        DataLoader(train, batch_size=BATCH, shuffle=True, num_workers=workers),
        DataLoader(valid, batch_size=BATCH, num_workers=workers),
    )


def build(weights: Path, classes: int) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights from a file and a new head."""
    model = timm.create_model(
        MODEL, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, num_classes=classes
    )
    return model.to(DEVICE)


def freeze(model: nn.Module, depth: int) -> list[nn.Module]:
    """Freezes the first `depth` stages: stem, seven blocks, head convolution; never the classifier. Returns what is frozen."""
    stages = [
        [model.conv_stem, model.bn1],
        *([block] for block in model.blocks),
        [model.conv_head, model.bn2],
    ]
    frozen = [module for stage in stages[:depth] for module in stage]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def train(
    params: Params,
    weights: Path,
    train_loader: DataLoader,
    valid_loader: DataLoader,
    keep: Callable[[nn.Module, float], object] = lambda model, score: None,
) -> Iterator[float]:
    """One training; yields the validation accuracy after each epoch, after `keep` got the model with it."""
    model = build(weights, len(train_loader.dataset.classes))
    frozen = freeze(model, params.freeze_depth)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=params.lr, momentum=params.momentum)
    criterion = nn.CrossEntropyLoss()
    for _ in range(params.epochs):
        model.train()
        for module in frozen:
            module.eval()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(images.to(DEVICE)), labels.to(DEVICE))
            loss.backward()
            optimizer.step()
        score = accuracy(model, valid_loader)
        keep(model, score)
        yield score


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    hits = sum(
        int((model(images.to(DEVICE)).argmax(1) == labels.to(DEVICE)).sum())
        for images, labels in loader
    )
    return hits / len(loader.dataset)


@torch.inference_mode()
def save_test_probabilities(model: nn.Module, folder: Path, size: int, out: Path) -> None:
    """Writes the class probabilities of <folder>/test as JSON: {"classes": [names], "rows": [[class, probabilities]]}."""
    model.eval()
    test = ImageFolder(str(folder / "test"), plain_transform(size))
    rows = []
    for images, labels in DataLoader(test, batch_size=BATCH):
        probabilities = model(images.to(DEVICE)).softmax(1).cpu()
        rows += [[int(y), p.tolist()] for y, p in zip(labels, probabilities, strict=True)]
    out.write_text(json.dumps({"classes": test.classes, "rows": rows}))


# -- what both scripts need around the loop


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that both searches have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="images: FOLDER/{train,valid}/<class>/*.jpg; photographs.py makes one",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        help=f"ImageNet weights of {MODEL}, a .safetensors file with timm's names",
    )
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images in pixels")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the sampler and of the training")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="loader processes; for small images on few cores 0 can be faster",
    )
    return parser


def age() -> float:
    """Seconds since this process was started, imports included (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def tell(event: str, trial: int, params: Params, **values: object) -> None:
    """One JSON line on stdout; `seconds` are wall seconds since the command's start."""
    line = {
        "event": event,
        "trial": trial,
        "params": asdict(params),
        **values,
        "seconds": round(age(), 3),
    }
    print(json.dumps(line), flush=True)

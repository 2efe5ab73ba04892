"""A recipe without search, in the manner of timm's training script: AdamW, cosine, warm-up, RandAugment, mixup, EMA.

    python benchmarks/plain_timm.py FOLDER --weights lite0.safetensors --probabilities OUT.json [--epochs 4] [--size 96]

The numbers are those with which timm's documentation fine-tunes: RandAugment of magnitude 9 (`rand-m9-inc1`; with noise in
the magnitude, `mstd0.5`, Pillow 13 refuses some strengths of `posterize`), mixup 0.2, label smoothing 0.1,
weight decay 0.05 but not on biases and norms, EMA 0.9998 with warm-up, the averaged weights tested after the last epoch.
"""

import argparse
from pathlib import Path

import timm
import torch
import twins
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--probabilities", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--size", type=int, default=twins.SIZE)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    wanted = timm.get_pretrained_cfg(twins.MODEL)
    transform = create_transform(
        args.size,
        is_training=True,
        auto_augment="rand-m9-inc1",
        interpolation=wanted.interpolation,
        mean=wanted.mean,
        std=wanted.std,
    )
    train = ImageFolder(str(args.folder / "train"), transform)
    loader = DataLoader(train, batch_size=twins.BATCH, shuffle=True, drop_last=True)
    classes = len(train.classes)
    model = twins.build(args.weights, classes)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    steps = args.epochs * len(loader)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps,
        warmup_t=steps // 10,
        warmup_lr_init=args.lr / 100,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    average = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=classes)
    criterion = SoftTargetCrossEntropy()
    step = 0
    model.train()
    for _ in range(args.epochs):
        for images, labels in loader:
            schedule.step_update(step)
            mixed, targets = mixup(images.to(twins.DEVICE), labels.to(twins.DEVICE))
            optimizer.zero_grad()
            criterion(model(mixed), targets).backward()
            optimizer.step()
            step += 1
            average.update(model, step=step)
    twins.save_test_probabilities(average.module, args.folder, args.size, args.probabilities)


if __name__ == "__main__":
    main()

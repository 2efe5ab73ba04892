"""The plain twin of the GPU kit's search: Optuna over ImageFolder, DataLoader and torchvision's ResNet-18; nothing of `tuner`.

    python benchmarks/gpu_plain_search.py FOLDER --trials trials.json

FOLDER/{train,valid}/<class>/*.jpg; trials.json is a list such as [{"lr": 0.01, "freeze_depth": 3}], all of which are trained.
One JSON line for each trial on stdout.
"""

import argparse
import json
import tempfile
from pathlib import Path

import optuna
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder


def loaders(args: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    transform = transforms.Compose(
        [
            transforms.Resize(args.size),
            transforms.CenterCrop(args.size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    shared = {
        "batch_size": args.batch,
        "num_workers": args.workers,
        "pin_memory": args.device.startswith("cuda"),
        "persistent_workers": args.workers > 0,
    }
    train, valid = (
        ImageFolder(str(args.folder / split), transform) for split in ("train", "valid")
    )
    return DataLoader(train, shuffle=True, **shared), DataLoader(valid, **shared)


def freeze(model: models.ResNet, depth: int) -> list[nn.Module]:
    """Freezes the stem and the first layers: `depth` stages. Returns what is frozen."""
    stages = [
        [model.conv1, model.bn1],
        [model.layer1],
        [model.layer2],
        [model.layer3],
        [model.layer4],
    ]
    frozen = [module for stage in stages[:depth] for module in stage]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def score_trial(
    args: argparse.Namespace, train: DataLoader, valid: DataLoader, lr: float, depth: int
) -> float:
    """The accuracy on the validation images after the last epoch."""
    model = models.resnet18(num_classes=len(train.dataset.classes))
    model = model.to(args.device, memory_format=torch.channels_last)
    frozen = freeze(model, depth)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, 0.9)
    kind = args.device.partition(":")[0]
    precision = torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")
    for _ in range(args.epochs):
        model.train()
        for module in frozen:
            module.eval()
        for images, labels in train:
            x = images.to(args.device, non_blocking=True, memory_format=torch.channels_last)
            with precision:
                loss = F.cross_entropy(model(x), labels.to(args.device, non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        model.eval()
        hits = 0
        with torch.inference_mode(), precision:
            for images, labels in valid:
                hits += int(
                    (model(images.to(args.device)).argmax(1) == labels.to(args.device)).sum()
                )
    return hits / len(valid.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    train, valid = loaders(args)
    trials = json.loads(args.trials.read_text())

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        depth = trial.suggest_int("freeze_depth", 0, 5)
        score = score_trial(args, train, valid, lr, depth)
        print(json.dumps({"event": "trial", "trial": trial.number, "score": score}), flush=True)
        return score

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        study = optuna.create_study(direction="maximize", storage=f"sqlite:///{folder}/study.db")
        for trial in trials:
            study.enqueue_trial(trial)
        study.optimize(objective, n_trials=len(trials))


if __name__ == "__main__":
    main()

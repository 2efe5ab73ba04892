"""Pretrain `resnet18_slim` on Fashion-MNIST and write the weights and card that ship in the package.

    python scripts/pretrain_resnet18_slim.py [--data FOLDER] [--epochs 30]

FOLDER holds the four `*-ubyte.gz` files: Debian's package `dataset-fashion-mnist` puts them where the default looks, and
torchvision's `datasets.FashionMNIST(root, download=True)` into `root/FashionMNIST/raw`. About 7 minutes on 2 CPU cores.
"""

import argparse
import gzip
import hashlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tuner.models.resnet import build_slim_resnet

OUT = Path(__file__).parent.parent / "tuner" / "models" / "resnet18_slim.safetensors"
MEAN, STD, SIZE = 0.286, 0.353, 32


def read_idx(path: Path) -> np.ndarray:
    """An IDX file (Le Cun's MNIST format, uint8) as an array."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Normalised images, float32 (n, 3, 32, 32), and labels, int64 (n,)."""
    pixels = (
        torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz").copy())[:, None].float()
        / 255
    )
    pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    labels = torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte.gz").copy()).long()
    return ((pixels - MEAN) / STD).expand(-1, 3, -1, -1), labels


def augment(x: Tensor) -> Tensor:
    """Each image flipped with chance 1/2 and shifted by up to 3 pixels."""
    n = len(x)
    x = torch.where((torch.rand(n) < 0.5)[:, None, None, None], x.flip(3), x)
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    shift = torch.randint(0, 7, (n, 2, 1))
    rows = shift[:, 0] + torch.arange(SIZE)
    cols = shift[:, 1] + torch.arange(SIZE)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(
        0, 3, 1, 2
    )


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    hits = sum(
        int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return hits / len(y)


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int = 128) -> None:
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))
    )
    for epoch in range(epochs):
        net.train()
        start, losses = time.monotonic(), []
        for index in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            batch_x = augment(x[index]).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(batch_x), y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(
            f"epoch {epoch + 1}/{epochs} loss {np.mean(losses):.3f} {time.monotonic() - start:.0f}s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    net = build_slim_resnet(10).to(memory_format=torch.channels_last)
    train(net, *load(args.data, "train"), epochs=args.epochs)
    net.half().float()  # the accuracy on the card is that of the half-precision weights which ship
    score = accuracy(net, *load(args.data, "t10k"))
    state = {
        k: v.half().contiguous() if v.is_floating_point() else v
        for k, v in net.state_dict().items()
    }
    save_file(state, OUT, metadata={"data": "Fashion-MNIST", "test_accuracy": f"{score:.4f}"})
    digest = hashlib.sha256(OUT.read_bytes()).hexdigest()
    OUT.with_suffix(".md").write_text(card(score, args.epochs, digest, OUT.stat().st_size))
    print(f"test accuracy {score:.4f}; wrote {OUT}")


def card(score: float, epochs: int, digest: str, size: int) -> str:
    return f"""# resnet18_slim

torchvision's ResNet-18 at quarter width (16, 32, 64, 128 channels; 703,386 parameters with 10 classes).

| | |
|---|---|
| data | Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017; MIT licence): 60,000 training images, enlarged to 32 x 32, grey as RGB |
| recipe | SGD, Nesterov momentum 0.9, lr 0.1 with cosine decay, weight decay 5e-4, label smoothing 0.1, batch 128, {epochs} epochs; flips and shifts of up to 3 pixels |
| test accuracy | {score:.2%} on the 10,000 test images, measured with the half-precision weights of this file |
| input | RGB in 0..1, 32 x 32, normalised with mean {MEAN} and standard deviation {STD} |
| file | resnet18_slim.safetensors, float16, {size:,} bytes |
| SHA-256 | {digest} |
| made by | scripts/pretrain_resnet18_slim.py |
"""


if __name__ == "__main__":
    main()

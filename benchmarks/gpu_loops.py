"""The plain twins of the GPU kit: the loops that one writes by hand, or that a library's own examples have.

Each is an iterator over epochs and says nothing; `gpu_measure.clocked` times it. They are meant to be good: channels-last,
the precision of the other side, fused optimizers, loader processes that persist, and no waiting for the GPU within an epoch
where the library's own loop does not wait either.
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.detectors import Objects, unpad_objects
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import Batch, Source
from tuner.training.devices import DeviceContext
from tuner.training.epoch import MAX_EVAL_BATCH, TrainingContext

MOMENTUM = 0.9


def fused(device: torch.device) -> bool:
    return device.type == "cuda"


def plain_model(context: TrainingContext) -> Any:
    """The native model of a context that trains nothing itself."""
    return context.staged_model.model


def read_all(source: Source) -> Batch:
    """The whole source in memory, in its first view; images channels-last."""
    parts = [source.take(index, 0) for index in torch.arange(len(source)).split(64)]
    return Batch(*(join([part[half] for part in parts]) for half in (0, 1)))


def join(trees: list[Any]) -> Any:
    """Batches in a row; texts are padded to the longest."""
    if isinstance(trees[0], Tensor):
        joined = torch.cat(trees)
        return joined.contiguous(memory_format=torch.channels_last) if joined.dim() == 4 else joined
    longest = {name: max(tree[name].shape[1:] for tree in trees) for name in trees[0]}
    return {
        name: torch.cat([pad(tree[name], shape) for tree in trees])
        for name, shape in longest.items()
    }


def pad(value: Tensor, shape: torch.Size) -> Tensor:
    return F.pad(value, (0, shape[0] - value.shape[1])) if len(shape) == 1 else value


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of images kept channels-last, channels-last again."""
    return x.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2) if x.dim() == 4 else x[index]


def bare_epochs(
    net: nn.Module, train: Batch, valid: Batch, where: DeviceContext, batch_size: int, lr: float
) -> Iterator[None]:
    """A classifier over float32 tensors that lie normalised in the device's memory."""
    optimizer = torch.optim.SGD(net.parameters(), lr, MOMENTUM, fused=fused(where.device))
    while True:
        net.train()
        total = torch.zeros((), device=where.device)
        order = torch.randperm(len(train.y), device=where.device)
        for index in order.split(batch_size):
            with where.autocast():
                loss = F.cross_entropy(net(rows(train.x, index)), train.y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(index)
        net.eval()
        with torch.no_grad(), where.autocast():
            chunks = torch.arange(len(valid.y), device=where.device).split(MAX_EVAL_BATCH)
            found = torch.cat([net(rows(valid.x, index)) for index in chunks])
        float((found.argmax(1) == valid.y).float().mean()), float(total)
        yield


def loader_epochs(
    context: TrainingContext, folder: Path, batch_size: int, lr: float, workers: int
) -> Iterator[None]:
    """A classifier over ImageFolder and DataLoader, as torchvision's references/classification has it."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    net, where, spec = plain_model(context), context.device_context, context.dataset.input_spec
    assert isinstance(spec, ImageInputSpec)
    transform = transforms.Compose(
        [
            transforms.Resize(spec.resize, transforms.InterpolationMode(spec.interpolation)),
            transforms.CenterCrop(spec.size),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    shared = {
        "batch_size": batch_size,
        "num_workers": workers,
        "pin_memory": where.device.type == "cuda",
        "persistent_workers": workers > 0,
    }
    train, valid = (
        DataLoader(ImageFolder(str(folder / split), transform), shuffle=split == "train", **shared)
        for split in ("train", "valid")
    )
    optimizer = torch.optim.SGD(net.parameters(), lr, MOMENTUM, fused=fused(where.device))

    def on_device(images: Tensor) -> Tensor:
        return images.to(where.device, non_blocking=True, memory_format=torch.channels_last)

    while True:
        net.train()
        for images, labels in train:
            with where.autocast():
                output = net(on_device(images))
                loss = F.cross_entropy(output, labels.to(where.device, non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        net.eval()
        hits = 0
        with torch.no_grad(), where.autocast():
            for images, labels in valid:
                hits += int((net(on_device(images)).argmax(1) == labels.to(where.device)).sum())
        yield


def detached_epochs(
    net: nn.Module,
    count: int,
    batch_size: int,
    step: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None = None,
    read_loss: bool = False,
) -> Iterator[None]:
    """Training passes of a library's own loop: `step` gives the loss of the examples at some indices.

    `read_loss`: the loss is read and checked at each step, as torchvision's references do for detectors.
    """
    while True:
        net.train()
        for index in torch.randperm(count).split(batch_size):
            loss = step(index)
            if read_loss and not math.isfinite(loss.item()):
                raise RuntimeError(f"the plain loop's loss is {loss.item()}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
            optimizer.step()
        yield


def objects_of(batch: Batch, first_label: int = 0) -> list[Objects]:
    """The objects of each image; torchvision counts classes from 1."""
    found = unpad_objects(batch.y["boxes"], batch.y["labels"])
    return [{**each, "labels": each["labels"] + first_label} for each in found]


def torchvision_epochs(context: TrainingContext, batch_size: int, lr: float) -> Iterator[None]:
    """A torchvision detector as its references/detection/engine.py trains it, over decoded images in memory."""
    net, where = plain_model(context), context.device_context
    batch = read_all(context.train)
    images, targets = list(batch.x), objects_of(batch, first_label=1)
    side = batch.x.shape[-1]
    # the images are normalised already; the transform still resizes and pads, which here changes nothing
    net.transform.image_mean, net.transform.image_std = [0.0] * 3, [1.0] * 3
    net.transform.fixed_size, net.transform.size_divisible = (side, side), 32

    def step(index: Tensor) -> Tensor:
        chosen = index.tolist()
        with where.autocast():
            losses = net([images[i] for i in chosen], [targets[i] for i in chosen])
            return functools.reduce(torch.add, losses.values())

    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, MOMENTUM, fused=fused(where.device))
    return detached_epochs(net, len(images), batch_size, step, optimizer, read_loss=True)


def rtdetr_epochs(
    context: TrainingContext, batch_size: int, lr: float, clip_norm: float
) -> Iterator[None]:
    """RT-DETR through transformers' own forward pass and loss."""
    from torchvision.ops import box_convert

    net, where = plain_model(context), context.device_context
    batch = read_all(context.train)
    side = batch.x.shape[-1]
    labels = [
        {"class_labels": o["labels"], "boxes": box_convert(o["boxes"], "xyxy", "cxcywh") / side}
        for o in objects_of(batch)
    ]

    def step(index: Tensor) -> Tensor:
        chosen = index.to(where.device)
        with where.autocast():
            found = net(
                pixel_values=rows(batch.x, chosen), labels=[labels[i] for i in index.tolist()]
            )
        loss: Tensor = found.loss
        return loss

    optimizer = torch.optim.AdamW(net.parameters(), lr, fused=fused(where.device))
    return detached_epochs(net, len(labels), batch_size, step, optimizer, clip_norm)


def unet_epochs(context: TrainingContext, batch_size: int, lr: float) -> Iterator[None]:
    """A U-Net as the examples of segmentation_models_pytorch train it: Dice loss, Adam."""
    import segmentation_models_pytorch as smp

    net, where = plain_model(context), context.device_context
    batch = read_all(context.train)
    dice = smp.losses.DiceLoss(smp.losses.MULTICLASS_MODE, from_logits=True)
    masks = batch.y.long()

    def step(index: Tensor) -> Tensor:
        chosen = index.to(where.device)
        with where.autocast():
            loss: Tensor = dice(net(rows(batch.x, chosen)).float(), masks[chosen])
        return loss

    optimizer = torch.optim.Adam(net.parameters(), lr, fused=fused(where.device))
    return detached_epochs(net, len(masks), batch_size, step, optimizer)


def bert_epochs(
    context: TrainingContext, batch_size: int, lr: float, clip_norm: float
) -> Iterator[None]:
    """BERT as transformers' Trainer trains it: each batch padded to its longest, gradients clipped."""
    net, where = plain_model(context), context.device_context
    batch = read_all(context.train)
    counts = batch.x["attention_mask"].sum(1).cpu()

    def step(index: Tensor) -> Tensor:
        chosen, longest = index.to(where.device), int(counts[index].max())
        inputs = {name: value[chosen, :longest] for name, value in batch.x.items()}
        with where.autocast():
            loss: Tensor = net(**inputs, labels=batch.y[chosen]).loss
        return loss

    optimizer = torch.optim.AdamW(net.parameters(), lr, fused=fused(where.device))
    return detached_epochs(net, len(batch.y), batch_size, step, optimizer, clip_norm)

"""The vocabulary: what flows (Batch), where it comes from (Source, Data), what is trained (Staged), what it is for (Task)."""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Tree = Tensor | dict[str, Tensor]
"""What flows between stages: a tensor or a flat dict of tensors, every leaf batch-first."""


class Batch(NamedTuple):
    x: Tree
    y: Any  # only the task looks inside


class Source(Protocol):
    """Examples behind integers. `view` names one fixed augmentation of each: equal arguments, equal batch."""

    @property
    def views(self) -> int | None:
        """How many views there are; None: endless."""

    @property
    def digest(self) -> str:
        """Equal digests, equal contents."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor, view: int) -> Batch:
        """The examples at `index` (int64, shape (n,)) under `view`."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input: shorter side to `resize`, centre crop to `size`, RGB in 0..1, (x - mean) / std."""

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Preprocess(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Data:
    """One data set, split. `full` is train and valid together, augmented like train: what the winner is trained on."""

    train: Source
    valid: Source
    test: Source
    full: Source
    classes: tuple[str, ...]
    preprocess: Preprocess
    digest: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Staged:
    """A native model and ordered views of it.

    For every depth, suffix(prefix(x)) == model(x), and each parameter lives in exactly one stage. The stages hold the
    model's own submodules, so training a suffix trains the model and the model keeps its native parameter names.
    """

    model: nn.Module
    stages: Mapping[str, nn.Module]
    notes: tuple[str, ...] = ()

    @property
    def max_depth(self) -> int:
        """The deepest freeze that leaves something to train: every stage but the last."""
        return len(self.stages) - 1

    def split(self, depth: int) -> tuple[nn.Module, nn.Module]:
        """The first `depth` stages, frozen and in eval mode (BatchNorm stands still), and the trainable rest."""
        if not 0 <= depth <= self.max_depth:
            raise ValueError(f"freeze depth must be in 0..{self.max_depth}, got {depth}")
        items = iter(self.stages.items())
        prefix = nn.Sequential(OrderedDict(islice(items, depth))).eval().requires_grad_(False)
        suffix = nn.Sequential(OrderedDict(items)).requires_grad_(True)
        return prefix, suffix


class Task(ABC):
    """What a model is for. Scores: larger is better. A task never sees the freeze depth."""

    metrics: ClassVar[tuple[str, ...]]

    @abstractmethod
    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The scalar that training minimises."""

    @abstractmethod
    def predict(self, net: nn.Module, x: Tree) -> Any:
        """What `score` wants of one batch."""

    @abstractmethod
    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Each of `metrics` over (prediction, truth) batches."""

    @abstractmethod
    def show(self, pairs: Iterable[tuple[Any, Any]], classes: tuple[str, ...]) -> dict[str, bytes]:
        """Files (name -> content) that show a person where the predictions are right and wrong; pictures by `figures.later`."""


class Normalised(nn.Module):
    """What is exported: RGB in 0..1, float32 (n, 3, size, size), to the model's own output."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)  # type: ignore[no-any-return]


def cut(model: nn.Module) -> Staged:
    """A model of the user's own: an nn.Sequential is cut at its children, anything else is one stage."""
    children = dict(model.named_children()) if isinstance(model, nn.Sequential) else {}
    return Staged(model, children or {"model": model})


def leaves(tree: Tree) -> dict[str, Tensor]:
    """The tree as a dict; a bare tensor is the leaf named ''."""
    return tree if isinstance(tree, dict) else {"": tree}


def digest_of(module: nn.Module) -> str:
    """SHA-256 over a module's structure, parameters and buffers."""
    seen = hashlib.sha256(repr(module).encode())
    for name, value in module.state_dict().items():
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return seen.hexdigest()

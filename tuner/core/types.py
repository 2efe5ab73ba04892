"""The vocabulary: what flows (Batch), where it comes from (Source, Data), what is trained (Staged), what it is for (Task)."""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tuner.core.input_spec import InputSpec, TensorTree, tree_to_dict


class Batch(NamedTuple):
    x: TensorTree
    y: TensorTree  # only the task looks inside


class Source(Protocol):
    """Examples behind integers. `view` names one fixed augmentation of each: equal arguments, equal batch."""

    @property
    def views(self) -> int | None:
        """How many views there are; None: endless."""

    @property
    def digest(self) -> str:
        """Equal digests, equal contents."""

    @property
    def lengths(self) -> Tensor | None:
        """What each example's cost follows, int64 (n,), such as its tokens; None where all cost alike."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor, view: int) -> Batch:
        """The examples at `index` (int64, shape (n,)) under `view`."""


@dataclass(frozen=True)
class Dataset:
    """One data set, split. `full` is train and valid together, augmented like train: what the winner is trained on."""

    train: Source
    valid: Source
    test: Source
    full: Source
    classes: tuple[str, ...]
    input_spec: InputSpec
    digest: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class StagedModel:
    """A native model and ordered views of it.

    For every depth, suffix(prefix(x)) == model(x), and each parameter lives in exactly one stage. The stages hold the
    model's own submodules, so training a suffix trains the model and the model keeps its native parameter names.

    `native` calls the model on what the first stage takes and gives what the last one gives, where that is not model(x), as with
    detectors that want lists. `probe`: the last stage is a linear classifier over features, which can be probed. `batched`: exports
    take any number of examples; otherwise one at a time.
    """

    model: nn.Module
    stages: Mapping[str, nn.Module]
    notes: tuple[str, ...] = ()
    native_forward: Callable[[nn.Module, TensorTree], TensorTree] | None = None
    can_probe: bool = True
    exports_batched: bool = True

    @property
    def max_depth(self) -> int:
        """The deepest freeze that leaves something to train: every stage but the last."""
        return len(self.stages) - 1

    def reference_output(self, x: TensorTree) -> TensorTree:
        """The native model's own answer, for whoever wants to compare."""
        return self.native_forward(self.model, x) if self.native_forward else self.model(x)

    def as_module(self) -> nn.Module:
        """The whole as a module that takes and gives what the stages do."""
        return nn.Sequential(OrderedDict(self.stages)) if self.native_forward else self.model

    def split(self, depth: int) -> tuple[nn.Module, nn.Module]:
        """The first `depth` stages, frozen and in eval mode (BatchNorm stands still), and the trainable rest."""
        if not 0 <= depth <= self.max_depth:
            raise ValueError(f"freeze depth must be in 0..{self.max_depth}, got {depth}")
        items = iter(self.stages.items())
        prefix = nn.Sequential(OrderedDict(islice(items, depth))).eval().requires_grad_(False)
        suffix = nn.Sequential(OrderedDict(items)).requires_grad_(True)
        return prefix, suffix


@dataclass(frozen=True)
class Prediction:
    """A prediction for one example: `line` for a terminal, `values` for programs, `picture` (PNG) to look at."""

    line: str
    values: Mapping[str, Any]
    picture: bytes | None = None


class Task(ABC):
    """What a model is for. Scores: larger is better. A task never sees the freeze depth."""

    metrics: ClassVar[tuple[str, ...]]
    output_description: ClassVar[str]  # what an export gives, in words

    @abstractmethod
    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The scalar that training minimises."""

    @abstractmethod
    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        """What `score` wants of one batch."""

    @abstractmethod
    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Each of `metrics` over (prediction, truth) batches."""

    @abstractmethod
    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        """Files (name -> content) that show a person where the predictions on `data.valid`, in its order, are right and wrong."""

    @abstractmethod
    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        """How far two outputs of an export lie apart, relative to their size; a thousandth is what formats may differ by."""

    @abstractmethod
    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        """What an export's `function` says of the examples `x`; `originals` are upright PIL images, or texts, as the user has them."""


def relative_difference(expected: TensorTree, got: TensorTree) -> float:
    """The largest difference between two trees, relative to the largest value expected, which counts as 1 at least."""
    pairs = [
        (value.float(), tree_to_dict(got)[name].float())
        for name, value in tree_to_dict(expected).items()
    ]
    return max(
        (
            float((a - b).abs().max()) / max(1.0, float(a.abs().max()))
            for a, b in pairs
            if a.numel()
        ),
        default=0.0,
    )


def split_sequential(model: nn.Module) -> StagedModel:
    """A model of the user's own: an nn.Sequential is cut at its children, anything else is one stage."""
    children = dict(model.named_children()) if isinstance(model, nn.Sequential) else {}
    return StagedModel(model, children or {"model": model})


def module_digest(module: nn.Module) -> str:
    """SHA-256 over a module's structure, parameters and buffers."""
    seen = hashlib.sha256(repr(module).encode())
    for name, value in module.state_dict().items():
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return seen.hexdigest()

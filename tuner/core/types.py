"""The vocabulary of plug-ins.

A `Batch` is what flows, `Source` and `Dataset` are where it comes from, a `StagedModel` is what is
trained, and a `Task` is what it is trained for.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from tuner.core.adapters import trained_parameters
from tuner.core.example_results import ExampleResults, join_pairs, repeat_pair
from tuner.core.input_spec import InputSpec, TensorTree
from tuner.core.target_scale import TargetScale

NECK_NAMES = ("neck", "fpn", "extra", "decoder")  # of a stage between backbone and head


class Batch(NamedTuple):
    """Some examples. Every tensor is batch-first."""

    x: TensorTree  # inputs, or activations of a prefix
    y: TensorTree  # targets; only the task reads them


class Source(Protocol):
    """Examples that are taken by their index.

    A view is one fixed augmentation of every example: equal arguments of `take`, equal batch.
    """

    @property
    def views(self) -> int | None:
        """The number of views; None: there is no limit."""

    @property
    def digest(self) -> str:
        """A digest of the content: equal digests mean equal examples."""

    @property
    def lengths(self) -> Tensor | None:
        """The length of each example, int64 (n,), such as its number of tokens: its cost follows
        from it.

        None where all examples cost the same.
        """

    def __len__(self) -> int: ...

    def take(self, index: Tensor, view: int) -> Batch:
        """The examples at `index` (int64, (n,)) in `view`, which counts from 0."""


@runtime_checkable
class TargetSource(Protocol):
    """A source that can give targets without their inputs, which may be far larger."""

    def take_targets(self, index: Tensor) -> TensorTree:
        """The targets of the examples at `index` (int64, (n,)), without augmentation."""


@runtime_checkable
class ResidentSource(Protocol):
    """A source whose examples may be in the memory of a device."""

    def is_resident(self, view: int) -> bool:
        """Whether all examples of a view are there."""


@dataclass(frozen=True)
class Dataset:
    """The examples of a data section, split.

    `full` has the train and validation examples together, augmented like `train`: the winner is
    retrained on it. Equal digests mean equal datasets. `warnings` are lines for the user.
    `views_are_for_cache`: the views of `train` and `full` are limited only so that they can be
    cached; where nothing is, they may be endless. `classes` are the names of what a model gives:
    of classes, of labels, or of the targets of a regression.
    """

    train: Source
    valid: Source
    test: Source
    full: Source
    classes: tuple[str, ...]
    input_spec: InputSpec
    digest: str
    warnings: tuple[str, ...] = ()
    views_are_for_cache: bool = False


@dataclass(frozen=True)
class StagedModel:
    """A native model and ordered views of it.

    For every depth, suffix(prefix(x)) == model(x), and each parameter is in exactly one stage. The
    stages have the model's own submodules, so training a suffix trains the model, and the model
    keeps its native parameter names.

    Args:
        model: The model.
        stages: The stages by name, from input to output. The last one is the head. The first
            stage between backbone and head, where there is one, has one of NECK_NAMES.
        notes: Lines for the user, such as that the head is new.
        native_forward: Calls the model on the input of the first stage and gives the output of the
            last one, where that is not model(x), as with detectors that take lists. None: model(x).
        can_probe: Whether the last stage ends with a linear classifier of features, for a linear
            probe.
        head_is_new: Whether the last layer has no trained weights. One that has them is not probed.
        exports_batched: Whether exports take any number of examples; otherwise one at a time.
        pixel_classifiers: New 1x1 convolutions of the last stage over pretrained features, for a
            linear probe: for each output of the stage those that add up to its logits, before
            these are enlarged bilinearly to the size of the image.
        uncut_reason: Why the model has no more stages, in words, where that is not as it should be.
    """

    model: nn.Module
    stages: Mapping[str, nn.Module]
    notes: tuple[str, ...] = ()
    native_forward: Callable[[nn.Module, TensorTree], TensorTree] | None = None
    can_probe: bool = True
    head_is_new: bool = True
    exports_batched: bool = True
    pixel_classifiers: tuple[tuple[nn.Conv2d, ...], ...] = ()
    uncut_reason: str | None = None

    @property
    def max_depth(self) -> int:
        """The greatest freeze depth: all stages but the last are frozen."""
        return len(self.stages) - 1

    @property
    def backbone_stages(self) -> tuple[str, ...]:
        """The names of the stages before the neck; without a neck, of all stages but the head."""
        names = list(self.stages)[:-1]
        return tuple(takewhile(lambda name: name not in NECK_NAMES, names))

    def reference_output(self, x: TensorTree) -> TensorTree:
        """The output of the native model, with which others are compared."""
        return self.native_forward(self.model, x) if self.native_forward else self.model(x)

    def as_module(self) -> nn.Module:
        """The model as a module with the input of the first stage and the output of the last."""
        return nn.Sequential(OrderedDict(self.stages)) if self.native_forward else self.model

    def split(self, depth: int) -> tuple[nn.Module, nn.Module]:
        """Splits the stages into prefix and suffix.

        Args:
            depth: The number of stages in the prefix, 0..max_depth.

        Returns:
            The prefix, frozen and in eval mode, so that BatchNorm does not change; and the
            suffix, of which all is trained, or with adapters these and the head.

        Raises:
            ValueError: There is no such depth.
        """
        if not 0 <= depth <= self.max_depth:
            raise ValueError(f"freeze depth must be in 0..{self.max_depth}, got {depth}")
        items = iter(self.stages.items())
        prefix = nn.Sequential(OrderedDict(islice(items, depth))).eval().requires_grad_(False)
        suffix = nn.Sequential(OrderedDict(items)).requires_grad_(False)
        for parameter in trained_parameters(suffix).values():
            parameter.requires_grad_(True)
        return prefix, suffix


@dataclass(frozen=True)
class Prediction:
    """A prediction for one example: a line for a person, values for a program, a picture (PNG)."""

    line: str
    values: Mapping[str, Any]
    picture: bytes | None = None


@dataclass(frozen=True)
class Mistake:
    """An example that got a wrong class: its index, both classes by name, and the probability of
    the wrong one.
    """

    index: int
    truth: str
    predicted: str
    confidence: float


class Task(ABC):
    """What a model learns. A task does not know the freeze depth.

    `metrics` are the names of its scores. Higher scores are better, but for those that MINIMISED
    beside METRICS in its module names.
    """

    metrics: tuple[str, ...]
    output_description: ClassVar[str]  # an export's output, in words
    target_scale: TargetScale | None = None  # of a net that gives standardised targets
    # `score` works on the CPU: it gets batches there, each while the next one is computed
    scores_on_cpu: ClassVar[bool] = False

    @abstractmethod
    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The scalar loss of `net` on `batch`, which training minimises."""

    def loss_parts(self, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss by name, scalar tensors; training minimises their sum.

        A training that diverges names the part. A task whose loss is one number leaves this as it
        is.
        """
        return {"loss": self.loss(net, batch)}

    @abstractmethod
    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        """The predictions of `net` for one batch of inputs, in the form that `score` takes."""

    def predict_originals(
        self, net: nn.Module, x: TensorTree, sizes: Sequence[tuple[int, int]], input_spec: InputSpec
    ) -> Iterable[TensorTree]:
        """The prediction for each example as its original target is, with a batch dimension of 1,
        for the test scores: of a source that is an OriginalTargetSource.

        `sizes`: width and height in pixels of each original image; `input_spec`: how these lie on
        the canvas. Raises NotImplementedError where the task has no such predictions.
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """The score of each of `metrics` over all batches.

        Args:
            pairs: (prediction, target) of each batch, as `predict` and `Source.take` gave them.
        """

    def fit_temperature(self, pairs: Sequence[tuple[Any, Any]]) -> float | None:
        """The temperature by which an export divides its logits, so that its probabilities are
        calibrated (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).

        A task may have one whose model gives one tensor of logits. A task without one leaves this
        as it is.

        Args:
            pairs: (prediction, target) of each batch of the validation split.

        Returns:
            The temperature, above 0; None for a task without one.
        """
        return None

    def fit_thresholds(self, pairs: Sequence[tuple[Any, Any]]) -> tuple[float, ...] | None:
        """The probability from which on an example has each of several labels.

        The exported run states them as `task.thresholds`. A task that has this key and not these
        thresholds may give them; another one leaves this as it is.

        Args:
            pairs: (prediction, target) of each batch of the validation split.

        Returns:
            One for each label, between 0 and 1; None for a task that chooses none.
        """
        return None

    def at_thresholds(self, thresholds: Sequence[float]) -> "Task":
        """The same task, which decides at these thresholds; a task without any is unchanged."""
        return self

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """Scores of each class by its name, for the manifest of an export.

        Args:
            pairs: (prediction, target) of each batch of the test split.

        Returns:
            For each class the values by name; empty for a task without classes, and for one that
            leaves this as it is.
        """
        return {}

    def list_mistakes(self, pairs: Sequence[tuple[Any, Any]]) -> list[Mistake] | None:
        """The examples that got a wrong class, the surest first.

        Args:
            pairs: (prediction, target) of each batch.

        Returns:
            None for a task that does not give each example one class; it leaves this as it is.
        """
        return None

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        """What each example adds to the scores: all that `score_results` needs.

        A task whose predictions are large, or whose score takes long, gives less here, such as a
        class and not the logits.

        Args:
            pairs: (prediction, target) of each batch, as for `score`.

        Returns:
            Tensors by name. Empty where nothing can be kept; then models are compared by their
            scores alone.
        """
        return join_pairs(pairs)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        """The scores of examples of which each is there `counts` times.

        With counts of 1 these are the scores that `score` gives.

        Args:
            results: What `example_results` gave, not empty.
            counts: int64 (n,), one for each example, with a sum above 0.
        """
        return self.score([repeat_pair(results, counts)])

    @abstractmethod
    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        """Files that show a person where the predictions are right and wrong.

        Args:
            pairs: (prediction, target) of each batch of `data.valid`, in its order.
            data: The dataset.

        Returns:
            The content of each file by name.
        """

    def mirror_output(self, output: TensorTree) -> TensorTree:
        """The output of a model for mirrored images, as it is for the images themselves.

        With test-time flips the mean of both outputs is the prediction. A task has them where it
        overrides this and names `test_flips` in SEARCH_KEYS beside METRICS.

        Args:
            output: What the model gave for a batch of images whose left and right are exchanged.

        Raises:
            NotImplementedError: The task has no test-time flips.
        """
        raise NotImplementedError

    @abstractmethod
    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        """The difference between two outputs of an export, relative to their size.

        Two formats may differ by 0.001.
        """

    @abstractmethod
    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        """A prediction for each example, made by an export.

        Args:
            function: The export.
            x: The examples in the form that an export takes.
            originals: The examples as the user has them: upright PIL images, or texts.
            input_spec: The input spec of the export.
        """


def split_sequential(model: nn.Module) -> StagedModel:
    """The stages of a user's own model: the children of an nn.Sequential; any other model is one
    stage.
    """
    children = dict(model.named_children()) if isinstance(model, nn.Sequential) else {}
    return StagedModel(model, children or {"model": model})

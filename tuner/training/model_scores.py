"""What pretrained models are worth for some data, before any of them is fine-tuned.

One forward pass over a sample gives the features of a model. Two scores follow from them: that of a
linear probe on validation examples, and LogME, the evidence of a Bayesian linear model (You et al.,
LogME: Practical Assessment of Pre-trained Models for Transfer Learning, ICML 2021).
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tuner.config.run import Run
from tuner.core.input_spec import TensorTree
from tuner.core.types import Source, StagedModel, Task
from tuner.errors import SpaceError, TunerError
from tuner.training.building import (
    DeviceSource,
    build_model,
    build_task,
    input_spec_of,
    load_dataset,
)
from tuner.training.devices import DeviceContext
from tuner.training.linear_probe import (
    LayerExamples,
    collect_layer_examples,
    find_output_layer,
    solve_output_layer,
)
from tuner.training.memory_format import place_model
from tuner.training.preparation import MemorySource

BATCH = 32  # examples of the forward pass
MAX_ROUNDS = 100  # of the fixed point of LogME
TOLERANCE = 1e-3  # relative change of a ratio at which it has converged
SMALLEST = 1e-12  # of a squared singular value, relative to the largest


@dataclass(frozen=True)
class ModelScore:
    """What a model's features are worth.

    Args:
        probe: The scores of a linear probe on the validation examples, by metric.
        logme: The log evidence per example; higher is better.
        milliseconds: Of the forward pass of one example, in batches, on this machine.
        parameters: Their number, with the head for these data.
        features: The number of features of an example.
    """

    probe: dict[str, float]
    logme: float
    milliseconds: float
    parameters: int
    features: int


class UnusableModel(Exception):
    """A model cannot be scored here; the message says why, in one line."""


def score_model(run: Run, device_context: DeviceContext) -> ModelScore:
    """Scores the model of a run on the run's data; `data.limit` says how many examples.

    Raises:
        UnusableModel: The model or its weights cannot be had, or it has no features to probe.
        DataError, SpaceError: The data cannot be used.
    """
    try:
        input_spec_of(run.model, device_context.home)
    except TunerError as error:
        raise UnusableModel(error.problems[0]) from None
    dataset = load_dataset(run, device_context.home)
    staged_model = build_probed_model(run, device_context, len(dataset.classes))
    trunk, head = staged_model.split(staged_model.max_depth)
    head.eval()
    passes = [
        compute_features(trunk, head, source, device_context)
        for source in (
            DeviceSource(part, dataset.input_spec, device_context)
            for part in (dataset.train, dataset.valid)
        )
    ]
    train, valid = (each.examples for each in passes)
    task = build_task(run, dataset.classes)
    return ModelScore(
        probe_scores(task, len(dataset.classes), train, valid),
        logme(train.inputs, target_columns(train.targets, len(dataset.classes))),
        statistics.median(ms for each in passes for ms in each.milliseconds),
        sum(value.numel() for value in staged_model.model.parameters()),
        train.inputs.shape[1],
    )


def build_probed_model(run: Run, device_context: DeviceContext, output_count: int) -> StagedModel:
    """The model of a run on the device, with stages whose outputs can be probed.

    Raises UnusableModel where it cannot be had, or it has no features to probe.
    """
    try:
        staged_model = build_model(run, device_context.home, output_count)
    except TunerError as error:
        raise UnusableModel(error.problems[0]) from None
    if not staged_model.can_probe or not staged_model.max_depth:
        raise UnusableModel("it has no linear head behind features that can be frozen")
    place_model(staged_model.model, device_context.device)
    return staged_model


class FeaturePass(NamedTuple):
    """The features of a source's examples, and the milliseconds of an example in each batch."""

    examples: LayerExamples
    milliseconds: list[float]


@torch.no_grad()
def compute_features(
    trunk: nn.Module, head: nn.Module, source: Source, device_context: DeviceContext
) -> FeaturePass:
    """One forward pass of all stages but the head; the features are what enters the head where that
    is a vector, otherwise what enters its last layer.

    Raises UnusableModel where there is no such layer.
    """
    outputs: list[TensorTree] = []
    targets: list[TensorTree] = []
    milliseconds: list[float] = []
    for index in torch.split(torch.arange(len(source)), BATCH):
        x, y = source.take(index, 0)
        wait_for(device_context.device)
        start = time.perf_counter()
        with device_context.autocast():
            outputs.append(trunk(x))
        wait_for(device_context.device)
        milliseconds.append(1000 * (time.perf_counter() - start) / len(index))
        targets.append(y)
    in_memory = MemorySource.join(outputs, targets, source.digest)
    return FeaturePass(
        select_features(head, in_memory, device_context.autocast), milliseconds[1:] or milliseconds
    )


def select_features(
    head: nn.Module, in_memory: MemorySource, autocast: Callable[[], AbstractContextManager[None]]
) -> LayerExamples:
    """The features of examples, float32 (n, features). Raises UnusableModel."""
    if isinstance(in_memory.x, Tensor) and in_memory.x.dim() == 2:
        return LayerExamples(in_memory.x.float(), in_memory.y)
    layer = find_output_layer(head, in_memory.take(torch.arange(1), 0).x, autocast)
    if layer is None:
        raise UnusableModel("its head does not end with a linear layer")
    return collect_layer_examples(head, layer, in_memory, BATCH, autocast)


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has computed what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def probe_scores(
    task: Task, output_count: int, train: LayerExamples, valid: LayerExamples
) -> dict[str, float]:
    """The scores of a linear layer that is solved on the training examples, for the validation
    examples, which also choose its penalty.
    """
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(train.inputs.shape[1], output_count, device=train.inputs.device)
    solve_output_layer(layer, task.loss, train, valid)
    with torch.no_grad():
        prediction = task.predict(layer, valid.inputs)
    scores = task.score([(prediction, valid.targets)])
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def target_columns(targets: TensorTree, output_count: int) -> Tensor:
    """Targets as columns, float64 (n, columns): of classes 0 and 1, of numbers as they are.

    Raises SpaceError where an example has several tensors as its target.
    """
    if not isinstance(targets, Tensor):
        raise SpaceError("--for is for tasks with one class or some numbers for each example")
    if targets.dim() > 1 or targets.is_floating_point():
        return targets.double().reshape(len(targets), -1)
    return nn.functional.one_hot(targets, output_count).double()


def logme(features: Tensor, columns: Tensor) -> float:
    """The mean log evidence per example over the columns of the targets.

    Each column is modelled as y = F w + noise, with w normal of precision alpha and noise normal of
    precision beta; both are those of the highest evidence, found by a fixed point (You et al.,
    Ranking and Tuning Pre-trained Models, JMLR 23, 2022, algorithm 3).

    Args:
        features: (n, features).
        columns: (n, columns).

    Raises SpaceError where no column varies.
    """
    columns = columns[:, columns.std(0) > 0]  # a class may have no example
    if not columns.shape[1]:
        raise SpaceError("--for: all training examples have the same target; nothing can be told")
    u, s, _ = torch.linalg.svd(features.double(), full_matrices=False)
    squares = s.square()
    kept = squares > SMALLEST * squares.max()
    squares, projected = squares[kept], u[:, kept].T @ columns.to(u)
    evidences = [
        column_evidence(squares, projected[:, i], float(columns[:, i].square().sum()), len(columns))
        for i in range(columns.shape[1])
    ]
    return statistics.fmean(evidences) / len(columns)


def column_evidence(squares: Tensor, projected: Tensor, total: float, count: int) -> float:
    """The highest log evidence of one column of targets.

    Args:
        squares: The squared singular values of the features, (k,).
        projected: The column in the basis of the left singular vectors, (k,).
        total: The squared norm of the column.
        count: The number of examples.
    """
    energy = projected.square()
    outside = max(total - float(energy.sum()), 0.0)  # of the column that no feature explains
    alpha = beta = 1.0
    for _ in range(MAX_ROUNDS):
        ratio = alpha / beta
        fitted = squares / (squares + ratio)
        effective = float(fitted.sum())
        weights = float((squares * energy / (squares + ratio).square()).sum())
        residual = float((energy * (1 - fitted).square()).sum()) + outside
        alpha = effective / (weights + 1e-12)
        beta = (count - effective) / (residual + 1e-12)
        if abs(alpha / beta - ratio) <= TOLERANCE * ratio:
            break
    ratio = alpha / beta
    fitted = squares / (squares + ratio)
    weights = float((squares * energy / (squares + ratio).square()).sum())
    residual = float((energy * (1 - fitted).square()).sum()) + outside
    # log N(y; 0, I / beta + F F' / alpha), in the basis of the singular vectors
    determinant = float(torch.log1p(squares / ratio).sum())
    return 0.5 * (
        count * math.log(beta)
        - determinant
        - beta * residual
        - alpha * weights
        - count * math.log(2 * math.pi)
    )

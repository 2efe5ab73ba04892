"""A task: classes that have an order, such as stars, grades or counts.

Ordinary classification counts every wrong class as equally wrong. Here a prediction that is one
class too high is a smaller error than one that is three classes too high, in loss and metric.

In a space file: `task: ordinal:build`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner.api import (
    Batch,
    Dataset,
    InputSpec,
    Prediction,
    Recipe,
    SpaceError,
    Task,
    TensorTree,
    relative_difference,
)

# tuner reads METRICS in the module of `build`. The first is what a search maximises unless
# `search.metric` names another one. Larger is always better, so an error is given as its negative.
METRICS = ("negative_mean_absolute_error", "accuracy")


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    *,
    power: Annotated[
        float, Field(ge=1, le=4, description="how much more a distant class counts than a near one")
    ] = 2.0,
) -> Task:
    """tuner passes the data's classes and the recipe; `power` is a key of the space file."""
    if recipe.label_smoothing:
        raise SpaceError("recipe.label_smoothing: the task ordinal has no use for it; remove it")
    return Ordinal(classes, power)


class Ordinal(Task):
    """y is int64, (n,): the rank of the class. Predictions are logits, float32 (n, classes)."""

    metrics = METRICS
    output_description = "logits in the order of the classes; their softmax has the probabilities"

    def __init__(self, classes: tuple[str, ...], power: float) -> None:
        self.classes, self.power = classes, power

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """Earth mover's distance: how far predicted and true cumulative distributions differ."""
        assert isinstance(batch.y, Tensor)
        logits: Tensor = net(batch.x).float()
        predicted = logits.softmax(1).cumsum(1)
        ranks = torch.arange(len(self.classes), device=predicted.device)
        true = (ranks >= batch.y[:, None]).float()
        distances = (predicted - true).abs() ** self.power
        return distances.sum(1).mean()

    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        """What `score` and `make_artifacts` need of one batch. Gradients are off."""
        logits: Tensor = net(x).float()
        return logits

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Every metric of METRICS, over all batches together."""
        ranks, truth = concatenate_ranks(pairs)
        return {
            "negative_mean_absolute_error": -float((ranks - truth).abs().float().mean()),
            "accuracy": float((ranks == truth).float().mean()),
        }

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        """Files for the dashboard: here one table, with the mean error of each class."""
        ranks, truth = concatenate_ranks(pairs)
        lines = ["class,examples,mean_absolute_error"]
        for rank, name in enumerate(self.classes):
            errors = (ranks - truth)[truth == rank].abs().float()
            lines.append(f"{name},{len(errors)},{errors.mean():.4f}")
        return {"per_class.csv": "\n".join([*lines, ""]).encode()}

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        """How tuner decides whether an export computes what the model computes."""
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        """What `tuner predict` prints for each example, and what it writes with --json."""
        logits = function(x)
        assert isinstance(logits, Tensor)
        predictions = []
        for rank, probabilities in zip(median_ranks(logits), logits.softmax(1), strict=True):
            name = self.classes[int(rank)]
            values = dict(zip(self.classes, probabilities.tolist(), strict=True))
            predictions.append(Prediction(name, {"class": name, "probabilities": values}))
        return predictions


def median_ranks(logits: Tensor) -> Tensor:
    """The median of each predicted distribution, the rank with the least expected error."""
    cumulative = logits.softmax(1).cumsum(1)
    return (cumulative < 0.5).sum(1).clamp(max=logits.shape[1] - 1)


def concatenate_ranks(pairs: Iterable[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Predicted and true ranks of all batches, int64 (n,) each, on the CPU."""
    logits, truth = zip(*pairs, strict=True)
    return median_ranks(torch.cat(logits).cpu()), torch.cat(truth).cpu()

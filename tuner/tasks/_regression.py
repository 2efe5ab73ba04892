"""What the tasks share that give each example one or several numbers; of images and of texts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner import deferred_figures
from tuner.core.example_results import PREDICTION, TARGET, ExampleResults, join_pairs
from tuner.core.input_spec import InputSpec, TensorTree, tree_to_dict
from tuner.core.losses import weighted_mean
from tuner.core.target_scale import TargetScale
from tuner.core.targets import split_weights
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.preprocessing.tokenization import decode_texts, trim_padding
from tuner.tasks._classification_reports import concatenate_pairs
from tuner.tasks._csv_tables import encode_csv

LossName = Literal["mse", "mae", "huber"]
LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "huber": F.huber_loss,
}
MAX_ERRORS_LISTED, MAX_POINTS = 50, 1000


class RegressionTask(Task):
    """Gives each example numbers.

    y is float32 (n, targets), perhaps with weights; predictions are float32 (n, targets), both in
    the units of the data. A net gives standardised targets: `scale` has the means and deviations
    of the training examples. An export gives the units of the data.

    Args:
        targets: The names of the targets.
        loss_name: mse, mae or huber, of the standardised targets.
        train_targets: float (n, targets), of the training examples; None: nothing is standardised,
            as with the outputs of an export.
    """

    output_description = "the targets in their order, in the units of the data"

    def __init__(
        self, targets: tuple[str, ...], loss_name: LossName, train_targets: Tensor | None
    ) -> None:
        self.targets, self.loss_of = targets, LOSSES[loss_name]
        self.target_scale = None if train_targets is None else TargetScale.of(train_targets)

    def outputs(self, net: Callable[[TensorTree], TensorTree], x: TensorTree) -> Tensor:
        """What a net or an export gives for a batch of inputs, float32 (n, targets)."""
        outputs = net(trim_padding(x))
        assert isinstance(outputs, Tensor)
        return outputs.float()

    def loss(self, net: Callable[[TensorTree], TensorTree], batch: Batch) -> Tensor:
        truth, example_weights = split_weights(batch.y)
        assert isinstance(truth, Tensor)
        if self.target_scale is not None:
            truth = self.target_scale.standardise(truth)
        losses = self.loss_of(self.outputs(net, batch.x), truth, reduction="none").mean(1)
        return weighted_mean(losses, example_weights)

    def predict(self, net: Callable[[TensorTree], TensorTree], x: TensorTree) -> Tensor:
        outputs = self.outputs(net, x)
        return outputs if self.target_scale is None else self.target_scale.restore(outputs)

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        predicted, truth = concatenate_pairs(pairs)
        return mean_scores(target_scores(predicted, truth))

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """R², MAE, RMSE and the number of examples, by target."""
        predicted, truth = concatenate_pairs(pairs)
        scores = target_scores(predicted, truth)
        return {
            name: {key: float(values[i]) for key, values in scores.items()}
            | {"examples": len(truth)}
            for i, name in enumerate(self.targets)
        }

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        return join_pairs(pairs)

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        return mean_scores(target_scores(results[PREDICTION], results[TARGET], counts))

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        """The scores of each target, the largest errors, and predicted against true values."""
        predicted, truth = concatenate_pairs(pairs)
        by_target = [
            [name, *(f"{scores[key]:.6g}" for key in ("r2", "mae", "rmse"))]
            for name, scores in self.class_scores(pairs).items()
        ]
        points = torch.linspace(0, len(truth) - 1, min(MAX_POINTS, len(truth))).long()
        return {
            "per_target.csv": encode_csv(["target", "r2", "mae", "rmse"], by_target),
            "largest_errors.csv": self._list_errors(predicted, truth, data),
            "predicted.png": deferred_figures.defer_figure(
                "predicted",
                targets=list(self.targets),
                truth=truth[points].T.tolist(),
                predicted=predicted[points].T.tolist(),
            ),
        }

    def _list_errors(self, predicted: Tensor, truth: Tensor, data: Dataset) -> bytes:
        """The examples with the largest errors, relative to the deviation of each target; texts
        as the model saw them, images by their number in the validation split.
        """
        deviation = truth.std(0, correction=0).clamp_min(1e-12)
        errors = ((predicted - truth).abs() / deviation).max(1).values
        worst = errors.argsort(descending=True, stable=True)[:MAX_ERRORS_LISTED]
        examples = [str(i) for i in worst.tolist()]
        if data.input_spec.max_length is not None:
            examples = decode_texts(data.input_spec, data.valid.take(worst, 0).x)
        header = [f"{kind} {name}" for name in self.targets for kind in ("true", "predicted")]
        rows = [
            [
                example,
                *(
                    f"{value:.6g}"
                    for t in range(len(self.targets))
                    for value in (float(truth[row, t]), float(predicted[row, t]))
                ),
            ]
            for example, row in zip(examples, worst.tolist(), strict=True)
        ]
        return encode_csv(["example", *header], rows)

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        """Relative to the largest value of each target: it may be of any size."""
        one, other = (tree_to_dict(tree)[""].double() for tree in (expected, got))
        if not one.numel():
            return 0.0
        largest = one.abs().max(0).values.clamp_min(1e-12)
        return float(((one - other).abs() / largest).max())

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        """The number of each target."""
        return [
            Prediction(
                "  ".join(f"{name} {v:.6g}" for name, v in zip(self.targets, values, strict=True)),
                {"targets": dict(zip(self.targets, values, strict=True))},
            )
            for values in self.outputs(function, x).tolist()
        ]


def target_scores(
    predicted: Tensor, truth: Tensor, counts: Tensor | None = None
) -> dict[str, Tensor]:
    """The scores of each target.

    Args:
        predicted: float (n, targets), on the CPU.
        truth: float (n, targets).
        counts: int64 (n,), how often each example is there; None: once.

    Returns:
        `r2`, the share of the variance that is explained (0 where the truth does not vary), `mae`
        and `rmse`, the mean absolute and the root mean squared error: float64 (targets,) each.
    """
    predicted, truth = predicted.double(), truth.double()
    weights = torch.ones(len(truth)).double() if counts is None else counts.double()
    weights = (weights / weights.sum())[:, None]
    errors = predicted - truth
    squared = (weights * errors.square()).sum(0)
    mean = (weights * truth).sum(0)
    variance = (weights * (truth - mean).square()).sum(0)
    varies = variance > (1e-9 * mean).square()  # rounding is no variance
    explained = 1 - squared / variance.where(varies, 1.0)
    return {
        "r2": explained.where(varies, 0.0),
        "mae": (weights * errors.abs()).sum(0),
        "rmse": squared.sqrt(),
    }


def mean_scores(scores: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each score over the targets."""
    return {name: float(values.mean()) for name, values in scores.items()}

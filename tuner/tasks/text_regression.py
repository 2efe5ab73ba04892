"""One or several numbers per text, such as an age, and a loss of their errors."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from tuner.config.run import Recipe
from tuner.core.types import Task
from tuner.tasks._regression import RegressionTask

METRICS = ("r2", "mae", "rmse")
MINIMISED = ("mae", "rmse")

OUTPUTS = "targets"
RECIPES_OF = "text_classification"
REFUSED_RECIPE_KEYS = ("label_smoothing",)


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    train_targets: Tensor | None = None,
    *,
    loss: Annotated[
        Literal["mse", "mae", "huber"],
        Field(
            description="of the standardised targets: the mean squared or absolute error, or "
            "Huber's, which is squared up to one standard deviation"
        ),
    ] = "mse",
) -> Task:
    """The task for these targets.

    Args:
        classes: the names of the targets.
        recipe: how the model is trained.
        train_targets: float (n, targets), of the training examples, whose means and deviations
            standardise the targets; None: they stay as they are.
        loss: mse, mae or huber.
    """
    return TextRegression(classes, loss, train_targets)


class TextRegression(RegressionTask):
    """Gives each text numbers."""

    metrics = METRICS

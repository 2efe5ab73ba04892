"""Any number of labels per image, and binary cross-entropy."""

from typing import Annotated

from pydantic import Field

from tuner.config.run import Recipe
from tuner.core.input_spec import TensorTree
from tuner.core.types import Task
from tuner.tasks._multilabel import MultilabelTask

METRICS = (
    "mean_average_precision",
    "f1",
    "micro_f1",
    "exact_match",
    "auroc",
    "log_likelihood",
    "log_loss",
    "hamming_loss",
)
COUNTED = ("f1", "micro_f1", "exact_match")
MINIMISED = ("log_loss", "hamming_loss")
RECIPE_KEYS = ("focal_gamma",)
SEARCH_KEYS = ("calibrate", "test_flips")
OUTPUTS = "labels"
RECIPES_OF = "classification"


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    *,
    thresholds: Annotated[
        Annotated[float, Field(gt=0, lt=1)]
        | tuple[Annotated[float, Field(gt=0, lt=1)], ...]
        | None,
        Field(
            description="probabilities from which on an example has a label: one for all, or a "
            "list with one for each; null: those with the highest F1 on validation, which "
            "best.yaml and the export then state"
        ),
    ] = None,
) -> Task:
    """The task for these labels.

    Args:
        classes: the names of the labels.
        recipe: how the model is trained; the loss follows it.
        thresholds: the probabilities from which on an example has a label.

    Raises:
        SpaceError: there are not as many thresholds as labels.
    """
    return Multilabel(classes, recipe, thresholds)


class Multilabel(MultilabelTask):
    """Gives each image any number of labels."""

    metrics = METRICS

    def mirror_output(self, output: TensorTree) -> TensorTree:
        """The logits as they are: a label has no left and right."""
        return output

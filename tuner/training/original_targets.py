"""Predictions in the form of targets as they are on the disk, such as masks at the size of their
image, for the test scores.
"""

from collections.abc import Iterator

import torch

from tuner.core.input_spec import TensorTree
from tuner.core.targets import OriginalTargetSource
from tuner.core.types import Source, Task
from tuner.training.epoch import MAX_EVAL_BATCH, TrainingContext


def find_originals(task: Task, source: Source) -> OriginalTargetSource | None:
    """The source, where it has targets as they are on the disk and the task predicts such."""
    if type(task).predict_originals is Task.predict_originals:
        return None
    if isinstance(source, OriginalTargetSource) and source.has_originals:
        return source
    return None


@torch.no_grad()
def predict_originals(
    context: TrainingContext, source: Source, originals: OriginalTargetSource, batch_size: int
) -> Iterator[tuple[TensorTree, TensorTree]]:
    """Yields the prediction and the target of each example at the size of its original image.

    One at a time, as originals may be large.
    """
    context.net.eval()
    input_spec = context.dataset.input_spec
    for index in torch.split(torch.arange(len(source)), min(MAX_EVAL_BATCH, 4 * batch_size)):
        truths = [originals.take_original(number) for number in index.tolist()]
        sizes = [(truth.shape[1], truth.shape[0]) for truth in truths]
        with context.device_context.autocast():
            predictions = context.task.predict_originals(
                context.net, source.take(index, 0).x, sizes, input_spec
            )
            for prediction, truth in zip(predictions, truths, strict=True):
                yield prediction, truth[None]

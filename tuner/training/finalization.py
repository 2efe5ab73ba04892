"""The winner: retrained on train and validation examples, scored once on the test examples,
exported and published.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tuner.core.export_module import ExportModule
from tuner.core.types import StagedModel
from tuner.errors import DataError, NoUsableTrial
from tuner.manifest import PublishedExport, read_export, recover_export
from tuner.messages import Assignment, Epoch, FinalizeJob
from tuner.training.building import load_dataset
from tuner.training.checkpoints import load_best_weights
from tuner.training.devices import select_device
from tuner.training.epoch import Diverged, TrainingContext, predict_source
from tuner.training.exported_models import load_exporter, model_without_weights
from tuner.training.own_metric import score_own_metric
from tuner.training.preparation import prepare_training
from tuner.training.publishing import publish
from tuner.training.training_loop import FitProgress, fit, open_checkpoints

DIVERGED_HINT = "lower recipe.lr, or export the next best with `tuner export STUDY --trial N`"


class TestScores(NamedTuple):
    """The scores on the test examples: of all of them, and of each class by its name."""

    scores: dict[str, float]
    per_class: dict[str, dict[str, float]]


class TrainedModel(NamedTuple):
    """A model that is ready for its export."""

    staged_model: StagedModel
    scores: dict[str, Any]  # "valid", "test", and of the test split "per_class"
    seconds: float  # of its training


def finalize(
    job: FinalizeJob, report: Callable[[Epoch], bool], slot: int
) -> PublishedExport | None:
    """Trains the winner's model, exports it and publishes the export.

    Args:
        job: The run of the winner, and where and how to export it.
        report: Hears each epoch of the retraining; False stops it.
        slot: The worker's number, from 0.

    Returns:
        What was published; None when `report` returned False.

    Raises:
        ExportMismatch: An export, read back, differs from the model.
        NoUsableTrial: The training diverged.
        DataError: The weights that the trial left are damaged or belong to another model.
    """
    folder = Path(job.export_folder)
    recover_export(folder)
    assignment = job.assignment
    dataset = load_dataset(assignment.run, Path(assignment.home))
    trained = load_earlier_export(folder, assignment) or train_model(job, report, slot)
    if trained is None:
        return None
    staged_model, scores, seconds = trained
    staged_model.model.cpu().float().to(memory_format=torch.contiguous_format)
    model = ExportModule(staged_model, dataset.input_spec).eval()
    return publish(job, model, dataset, scores, seconds)


def train_model(
    job: FinalizeJob, report: Callable[[Epoch], bool], slot: int
) -> TrainedModel | None:
    """Retrains the winner, or loads the weights that its trial left, and scores it on the test
    examples.

    Returns None when `report` returned False. Raises NoUsableTrial, DataError.
    """
    start = time.monotonic()
    assignment = job.assignment
    device_context = select_device(
        assignment.engine, Path(assignment.home), slot, assignment.micro_batches
    )
    valid_scores = dict(job.valid_scores)
    try:
        # its linear probe may diverge too
        context = prepare_training(
            assignment.run, device_context, assignment.metric, assignment.direction
        )
        for progress in [] if job.weights_file else retrain(assignment, context):
            if progress.best is not None:
                valid_scores = progress.best.epoch.scores
            if not report(progress.epoch):
                return None
        if job.weights_file and not load_best_weights(
            Path(job.weights_file), context.staged_model.model, context.net
        ):
            raise DataError(
                f"{job.weights_file}: damaged or of another model; with search.retrain: true the "
                "run is trained again"
            )
        test = score_test_split(context, assignment.run.recipe.batch_size)
    except Diverged as error:
        raise NoUsableTrial(f"training diverged ({error}); {DIVERGED_HINT}") from None
    scores = {"valid": valid_scores, "test": test.scores, "per_class": test.per_class}
    return TrainedModel(context.staged_model, scores, time.monotonic() - start)


def retrain(assignment: Assignment, context: TrainingContext) -> Iterator[FitProgress]:
    """Trains the winner again. A retraining that was killed goes on from its checkpoint."""
    folder = Path(assignment.checkpoint_folder) if assignment.checkpoint_folder else None
    checkpoints = open_checkpoints(assignment.run, context, folder)
    return fit(context, assignment.run.recipe, assignment.run.seed, checkpoints)


def score_test_split(context: TrainingContext, batch_size: int) -> TestScores:
    """The scores on the test examples; called once per winner. Raises Diverged."""
    predictions = predict_source(context, context.test, batch_size)
    scores = context.task.score(predictions)
    if not all(map(math.isfinite, scores.values())):
        raise Diverged("the test scores are not finite")
    scores |= score_own_metric(context.metric, predictions)
    return TestScores(scores, context.task.class_scores(predictions))


def load_earlier_export(folder: Path, assignment: Assignment) -> TrainedModel | None:
    """The model of an earlier export of the same run: a further format needs no training."""
    published = read_export(folder)
    if published is None or published.manifest["run_digest"] != assignment.run.digest():
        return None
    # the model is built from the manifest's run, and a manifest from elsewhere may name another
    # run than its digest says
    if published.run.digest() != assignment.run.digest():
        return None
    model = model_without_weights(published)
    load_exporter("safetensors").restore(
        published.folder / published.manifest["exports"]["safetensors"]["file"], model
    )
    return TrainedModel(
        model.staged[0], published.manifest["scores"], published.manifest["training_seconds"]
    )

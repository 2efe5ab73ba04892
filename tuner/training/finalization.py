"""The winner: retrained on train and validation examples, scored once on the test examples,
exported and published. The default recipe beside it: retrained and scored in the same way.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tuner.core.export_module import ExportModule
from tuner.core.output_modules import FlippedPair, ScaledLogits, require_flips
from tuner.core.target_scale import TargetScale
from tuner.core.types import StagedModel
from tuner.errors import DataError, NoUsableTrial
from tuner.manifest import (
    TEST_RESULTS,
    PublishedExport,
    averaged_runs,
    is_export_of,
    read_export,
    recover_export,
)
from tuner.messages import (
    Assignment,
    DefaultTestJob,
    Epoch,
    FinalizeJob,
    Ingredient,
)
from tuner.training.adapters import merge_adapters
from tuner.training.building import DeviceSource, load_dataset
from tuner.training.checkpoint_content import load_best_weights
from tuner.training.devices import select_device
from tuner.training.epoch import Diverged, TrainingContext, predict_source
from tuner.training.exported_models import load_exporter, model_without_weights
from tuner.training.label_thresholds import decide_thresholds
from tuner.training.original_targets import find_originals, predict_originals
from tuner.training.own_metric import score_own_metric
from tuner.training.preparation import prepare_training
from tuner.training.publishing import publish
from tuner.training.rank_launcher import call_on_ranks
from tuner.training.soup import make_soup, run_at_common_depth, soup_digest
from tuner.training.tested_runs import TestedRun, compare_tested_runs
from tuner.training.training_loop import FitProgress, fit, open_checkpoints

DIVERGED_HINT = "lower recipe.lr, or export the next best with `tuner export STUDY --trial N`"


class TrainedModel(NamedTuple):
    """A model that is ready for its export.

    `scores` are those of the splits `valid` and `test`, and `per_class` of the test split;
    `seconds` is what its training took. `findings` are what the manifest says of its outputs, of
    the default recipe, of the trial's repeats and of the soup. `tested_run` is the file with its
    test, None where it is not compared.
    """

    staged_model: StagedModel
    scores: dict[str, Any]
    seconds: float
    findings: dict[str, Any]
    tested_run: bytes | None = None

    @property
    def temperature(self) -> float | None:
        """What the export divides the logits by; None: nothing."""
        return self.findings["temperature"]  # type: ignore[no-any-return]

    @property
    def target_scale(self) -> TargetScale | None:
        """How the export brings the outputs into the units of the targets; None: not at all."""
        scale = self.findings["target_scale"]
        return None if scale is None else TargetScale.from_dict(scale)


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
        DataError: The weights that a trial left are damaged or belong to another model.
    """
    folder = Path(job.export_folder)
    recover_export(folder)
    trained = load_earlier_export(folder, job)
    if trained is not None:
        return publish_model(job, trained)
    published: PublishedExport | None = call_on_ranks(
        f"{__name__}:finalize_anew", job, report, slot, trains=is_trained(job)
    )
    return published


def finalize_anew(
    job: FinalizeJob, report: Callable[[Epoch], bool], slot: int
) -> PublishedExport | None:
    """`finalize` without an earlier export, in this process, which may be one of several ranks."""
    trained = train_winner(job, report, slot)
    return publish_model(job, trained) if trained is not None else None


def publish_model(job: FinalizeJob, trained: TrainedModel) -> PublishedExport:
    """Exports a trained model and publishes the export. Raises ExportMismatch."""
    assignment = job.assignment
    dataset = load_dataset(assignment.run, Path(assignment.home))
    staged_model = trained.staged_model
    staged_model.model.cpu().float().to(memory_format=torch.contiguous_format)
    merge_adapters(staged_model.model)
    model = ExportModule(
        staged_model, dataset.input_spec, trained.temperature, trained.target_scale
    ).eval()
    return publish(
        job,
        model,
        dataset,
        trained.scores,
        trained.seconds,
        trained.findings,
        trained.tested_run,
    )


def run_default_test(
    job: DefaultTestJob, report: Callable[[Epoch], bool], slot: int
) -> bytes | None:
    """Trains the default recipe's model as the winner's, and scores it on the test examples.

    Returns the content of the file with its test; None when `report` returned False. Raises
    NoUsableTrial, DataError.
    """
    content: bytes | None = call_on_ranks(
        f"{__name__}:run_default_test_here", job, report, slot, trains=is_trained(job)
    )
    return content


def run_default_test_here(
    job: DefaultTestJob, report: Callable[[Epoch], bool], slot: int
) -> bytes | None:
    """`run_default_test` in this process, which may be one of several ranks."""
    trained = train_model(job, report, slot)
    return trained.tested_run.to_bytes() if trained is not None else None


def train_winner(
    job: FinalizeJob, report: Callable[[Epoch], bool], slot: int
) -> TrainedModel | None:
    """Trains and tests the winner's model, and compares its test with the default recipe's.

    Returns None when `report` returned False. Raises NoUsableTrial, DataError.
    """
    start = time.monotonic()
    ingredients = job.soup.ingredients if job.soup is not None else ()
    if job.soup is not None and averaged_runs(job.soup.findings) and not ingredients:
        raise DataError(
            f"{job.export_folder}: was changed meanwhile; the same command makes it anew"
        )
    trained = train_model(job, report, slot, ingredients)
    if trained is None:
        return None
    context, tested_run = trained.context, trained.tested_run
    scores = {
        "valid": trained.valid_scores or dict(job.valid_scores),
        "test": tested_run.scores,
        "per_class": tested_run.per_class,
    }
    seconds = time.monotonic() - start + (job.soup.seconds if job.soup is not None else 0.0)
    findings: dict[str, Any] = {
        "calibrate": job.outputs.calibrate,
        "temperature": tested_run.temperature,
        "thresholds": list(trained.thresholds) if trained.thresholds is not None else None,
        "target_scale": scale.to_dict() if (scale := context.task.target_scale) else None,
        "test_flips": job.outputs.test_flips,
        "comparison": None,
        "confirmation": job.confirmation,
        "soup": job.soup.findings if job.soup is not None else None,
    }
    if job.comparison is None:
        return TrainedModel(context.staged_model, scores, seconds, findings)
    comparison: dict[str, Any] = {"default_trial": job.comparison.trial_number}
    if job.comparison.tested_run is not None:
        default = TestedRun.from_bytes(job.comparison.tested_run)
        comparison |= compare_tested_runs(
            context.task, context.metric, tested_run, default, job.comparison.seed
        )
    findings["comparison"] = comparison
    return TrainedModel(context.staged_model, scores, seconds, findings, tested_run.to_bytes())


def is_trained(job: FinalizeJob | DefaultTestJob) -> bool:
    """Whether a job trains a model, and takes no weights that trials left."""
    takes_soup = isinstance(job, FinalizeJob) and job.soup is not None and job.soup.ingredients
    return job.weights_file is None and not takes_soup


class TestedModel(NamedTuple):
    """A model that was trained and tested. `valid_scores` are empty where it was not scored on
    validation examples; `thresholds` are those of the labels, None where the task has none.
    """

    context: TrainingContext
    valid_scores: dict[str, float]
    tested_run: TestedRun
    thresholds: tuple[float, ...] | None


def train_model(
    job: FinalizeJob | DefaultTestJob,
    report: Callable[[Epoch], bool],
    slot: int,
    ingredients: Sequence[Ingredient] = (),
) -> TestedModel | None:
    """Retrains a run, or loads the weights that its trial left, or averages those of the
    ingredients of a soup, and scores it on the test examples.

    Returns None when `report` returned False. Raises NoUsableTrial, DataError.
    """
    assignment, weights_file, outputs = job.assignment, job.weights_file, job.outputs
    run = assignment.run
    temperature = outputs.calibrate if isinstance(outputs.calibrate, float) else None
    device_context = select_device(
        assignment.engine, Path(assignment.home), slot, assignment.micro_batches
    )
    valid_scores: dict[str, float] = {}
    fitted: tuple[float, ...] = ()
    try:
        # its linear probe may diverge too
        context = prepare_training(
            run_at_common_depth(run, ingredients),
            device_context,
            assignment.metric,
            assignment.direction,
        )
        for progress in [] if weights_file or ingredients else retrain(assignment, context):
            if progress.best is not None:
                valid_scores = progress.best.epoch.scores
                fitted = progress.best.epoch.thresholds
                if outputs.calibrate == "temperature":
                    temperature = progress.best.epoch.temperature
            if not report(progress.epoch):
                return None
        if ingredients:
            make_soup(context, ingredients, run.recipe.batch_size)
        elif weights_file and not load_best_weights(
            Path(weights_file), context.staged_model.model, context.net
        ):
            raise DataError(
                f"{weights_file}: damaged or of another model; with search.retrain: true the "
                "run is trained again"
            )
        thresholds = decide_thresholds(context, run, fitted, temperature)
        if thresholds is not None:
            context = replace(context, task=context.task.at_thresholds(thresholds))
        digest = soup_digest(ingredients) if ingredients else run.digest()
        tested_run = score_test_split(
            context, digest, run.recipe.batch_size, temperature, outputs.test_flips
        )
    except Diverged as error:
        raise NoUsableTrial(f"training diverged ({error}); {DIVERGED_HINT}") from None
    return TestedModel(context, valid_scores, tested_run, thresholds)


def retrain(assignment: Assignment, context: TrainingContext) -> Iterator[FitProgress]:
    """Trains a run again. A retraining that was killed goes on from its checkpoint."""
    folder = Path(assignment.checkpoint_folder) if assignment.checkpoint_folder else None
    checkpoints = open_checkpoints(assignment.run, context, folder)
    return fit(context, assignment.run.recipe, assignment.run.seed, checkpoints)


def score_test_split(
    context: TrainingContext,
    run_digest: str,
    batch_size: int,
    temperature: float | None,
    test_flips: bool,
) -> TestedRun:
    """Scores a run's model on the test examples, with the outputs that its export gives; called
    once per run.

    With `test_flips` the whole model is applied to each image and its mirror image, since the
    activations of the frozen stages are those of one of them. Raises Diverged, and SpaceError where
    the task has no such flips.
    """
    task, net, source = context.task, context.net, context.test
    if test_flips:
        require_flips(task)
        net = FlippedPair(context.staged_model.as_module(), task.mirror_output)
        source = DeviceSource(
            context.dataset.test, context.dataset.input_spec, context.device_context
        )
    if temperature is not None:
        net = ScaledLogits(net, temperature)
    context = replace(context, net=net)
    pairs = predict_source(context, source, batch_size)
    originals = find_originals(task, context.dataset.test)
    if originals is not None:
        results = task.example_results(predict_originals(context, source, originals, batch_size))
        scores = task.score_results(results, torch.ones(len(source), dtype=torch.int64))
    else:
        results, scores = task.example_results(pairs), task.score(pairs)
    if not all(map(math.isfinite, scores.values())):
        raise Diverged("the test scores are not finite")
    return TestedRun(
        run_digest,
        context.dataset.digest,
        scores | score_own_metric(context.metric, pairs),
        task.class_scores(pairs),
        len(context.test),
        results,
        temperature,
        test_flips,
    )


def load_earlier_export(folder: Path, job: FinalizeJob) -> TrainedModel | None:
    """The model of an earlier export of the same run: a further format needs no training.

    What that export says of the default recipe stays, and of the repeats unless the job knows more.
    """
    published, run = read_export(folder), job.assignment.run
    if published is None or not is_export_of(published.manifest, run, job.outputs):
        return None
    # the model is built from the manifest's run, and a manifest from elsewhere may name another
    # run than its digest says
    if published.run.digest() != run.digest():
        return None
    kept = (
        *("calibrate", "temperature", "thresholds", "target_scale", "test_flips"),
        *("comparison", "confirmation", "soup"),
    )
    findings = {name: published.manifest.get(name) for name in kept}
    soup = job.soup.findings if job.soup is not None else None
    if averaged_runs(findings["soup"]) != averaged_runs(soup):
        return None
    findings["soup"] = soup
    model = model_without_weights(published)
    load_exporter("safetensors").restore(
        published.folder / published.manifest["exports"]["safetensors"]["file"], model
    )
    if job.confirmation is not None:
        findings["confirmation"] = job.confirmation
    test_file = published.folder / TEST_RESULTS
    return TrainedModel(
        model.staged[0],
        published.manifest["scores"],
        published.manifest["training_seconds"],
        findings,
        test_file.read_bytes() if TEST_RESULTS in published.manifest["files"] else None,
    )

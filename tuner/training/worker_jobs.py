"""What workers do: survey models, inspect data and weights, carry out a trial.

Values in, values out.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tuner import deferred_figures
from tuner.config.objective import Direction
from tuner.config.plugins import read_task_names
from tuner.config.run import PluginConfig
from tuner.core.device_memory import forget_peak
from tuner.core.types import Dataset
from tuner.core.weights import is_path
from tuner.files.downloads import forbid_downloads
from tuner.messages import (
    Assignment,
    DatasetReport,
    Epoch,
    GpuUse,
    ModelSurvey,
    TrialResult,
)
from tuner.training.adapters import find_layers, import_peft
from tuner.training.building import build_model, check_metric, load_dataset
from tuner.training.class_balance import count_classes, macro_count
from tuner.training.cross_validation import fit_folds, prepare_folds, runs_of_folds
from tuner.training.data_parallel import joined_ranks
from tuner.training.devices import DeviceContext, select_device, select_gpus
from tuner.training.epoch import Diverged, TrainingContext
from tuner.training.gpu_use import GpuMeter
from tuner.training.micro_batches import (
    check_batch_size,
    is_out_of_memory,
    release_memory,
    release_reserved_memory,
)
from tuner.training.model_costs import costs_of, describe_excess
from tuner.training.preparation import prepare_training
from tuner.training.rank_launcher import call_on_ranks
from tuner.training.training_loop import BestEpoch


def survey_models(
    assignments: tuple[Assignment, ...], report: Callable[[Any], bool], slot: int
) -> ModelSurvey:
    """How deep each model can be frozen, and how many GPUs are used.

    Downloads and writes nothing.
    """
    depths: dict[str, int] = {}
    for assignment in assignments:
        home = Path(assignment.home)
        # names a missing device before anything else happens
        select_device(assignment.engine, home, slot)
        staged_model = build_model(assignment.run.without_weights(), home, 2)
        depths[assignment.run.model.name] = staged_model.max_depth
        lora = assignment.run.recipe.lora
        if lora is not None:
            import_peft()
            find_layers(staged_model, 0, lora, assignment.run.model.name)
    return ModelSurvey(depths, gpu_count=len(select_gpus(assignments[0].engine)))


def inspect_data(
    assignments: tuple[Assignment, ...], report: Callable[[Any], bool], slot: int
) -> DatasetReport:
    """Reads data and weights of every run as a trial would. Raises DataError, SpaceError."""
    warnings: list[str] = []
    notes: list[str] = []
    for assignment in assignments:
        run, home = assignment.run, Path(assignment.home)
        with forbid_downloads(not assignment.allow_downloads):
            for fold in runs_of_folds(run):
                dataset = load_dataset(fold, home)
            has_weights = assignment.allow_downloads or has_local_weights(run.model)
            check_metric(run, dataset.classes, assignment.metric)
            staged_model = build_model(
                run if has_weights else run.without_weights(), home, len(dataset.classes)
            )
        warnings += [*dataset.warnings, *check_batch_size(dataset, run)]
        notes += [f"{run.model.name}: {note}" for note in staged_model.notes]
    return DatasetReport(
        digest=dataset.digest,
        classes=dataset.classes,
        split_sizes={
            "train": len(dataset.train),
            "valid": len(dataset.valid),
            "test": len(dataset.test),
        },
        input_description=dataset.input_spec.describe_input(),
        parameter_count=sum(p.numel() for p in staged_model.model.parameters()),
        macro_count=count_for_macro_scores(dataset, run.task.name, assignment.metric),
        warnings=tuple(dict.fromkeys(warnings)),
        notes=tuple(dict.fromkeys(notes)),
    )


def count_for_macro_scores(dataset: Dataset, task: str, metric: str) -> float | None:
    """Of how many validation examples a score that is a mean over classes has the noise.

    None: the score is none.
    """
    if metric not in read_task_names(task, "MACRO"):
        return None
    return macro_count(count_classes(dataset.valid, len(dataset.classes)))


def has_local_weights(model: PluginConfig) -> bool:
    """Whether the model's weights are the user's own files: then nothing must be downloaded."""
    return is_path(str(model.options.get("weights", ""))) or model.options.get("folder") is not None


class TrialTraining(NamedTuple):
    """How the training of a trial ended. `context` is None where no training was prepared."""

    state: Literal["complete", "stopped", "diverged", "oom"]
    reason: str
    epochs: list[Epoch]
    best: BestEpoch | None
    context: TrainingContext | None


def run_trial(assignment: Assignment, report: Callable[[Epoch], bool], slot: int) -> TrialResult:
    """Carries out one trial: trains until the training ends or `report` returns False.

    A model beyond a limit is not trained.
    """
    if not assignment.limits:
        return run_on_gpus(f"{__name__}:run_trial_here", assignment, report, slot)
    start = time.monotonic()
    costs = costs_of(assignment.run, Path(assignment.home))
    excess = describe_excess(costs, assignment.limits)
    if excess is not None:
        return TrialResult("over_limit", (), 0, {}, time.monotonic() - start, excess, costs=costs)
    result = run_on_gpus(f"{__name__}:run_trial_here", assignment, report, slot)
    return replace(result, costs=costs)


def run_repeat(assignment: Assignment, report: Callable[[Epoch], bool], slot: int) -> TrialResult:
    """Trains a trial again, on one fold of the data, as `run_trial` does. It makes no artifacts."""
    return run_on_gpus(f"{__name__}:run_repeat_here", assignment, report, slot)


def run_on_gpus(
    function: str, assignment: Assignment, report: Callable[[Epoch], bool], slot: int
) -> TrialResult:
    """The result of a training on as many GPUs as the engine says for a trial.

    Afterwards torch keeps no memory of the GPU in reserve: the next trial judges by what is free
    what it may keep there, and so do workers that share the GPU.
    """
    start = time.monotonic()
    try:
        result: TrialResult = call_on_ranks(function, assignment, report, slot)
    except torch.OutOfMemoryError as error:
        return TrialResult("oom", (), 0, {}, time.monotonic() - start, str(error))
    finally:
        release_reserved_memory()
    return result


def run_trial_here(
    assignment: Assignment, report: Callable[[Epoch], bool], slot: int
) -> TrialResult:
    """`run_trial` in this process, which may be one of several ranks."""
    start = time.monotonic()
    training, gpu_use = train_and_measure(assignment, report, slot)
    if training.state == "oom":
        release_memory()
    return TrialResult(
        training.state,
        tuple(training.epochs),
        training.best.epoch.number if training.best else 0,
        make_artifacts(training, assignment.metric, assignment.direction),
        time.monotonic() - start,
        training.reason,
        gpu_use,
    )


def train_and_measure(
    assignment: Assignment, report: Callable[[Epoch], bool], slot: int
) -> tuple[TrialTraining, GpuUse | None]:
    """Trains a trial, and measures what it uses of its GPU where `engine.per_gpu` is auto."""
    if assignment.engine.per_gpu == "auto":
        device = select_device(assignment.engine, Path(assignment.home), slot).device
        if device.type == "cuda":
            with GpuMeter(device) as meter:
                training = train_trial(assignment, meter.listening(report), slot)
            return training, meter.use()
    return train_trial(assignment, report, slot), None


def run_repeat_here(
    assignment: Assignment, report: Callable[[Epoch], bool], slot: int
) -> TrialResult:
    """`run_repeat` in this process, which may be one of several ranks."""
    start = time.monotonic()

    def prepare(device_context: DeviceContext) -> list[TrainingContext]:
        return [
            prepare_training(
                assignment.run, device_context, assignment.metric, assignment.direction
            )
        ]

    training = train_trial(assignment, report, slot, prepare)
    if training.state == "oom":
        release_memory()
    best_epoch = training.best.epoch.number if training.best else 0
    seconds = time.monotonic() - start
    epochs = tuple(training.epochs)
    return TrialResult(training.state, epochs, best_epoch, {}, seconds, training.reason)


def train_trial(
    assignment: Assignment,
    report: Callable[[Epoch], bool],
    slot: int,
    prepare: Callable[[DeviceContext], list[TrainingContext]] | None = None,
) -> TrialTraining:
    """Trains a trial. Divergence and a lack of memory are ends of a trial, and no errors.

    `prepare` makes the context of each training; None: one for each of the run's folds.
    """
    epochs: list[Epoch] = []
    contexts: list[TrainingContext] = []
    best: BestEpoch | None = None
    state: Literal["complete", "stopped", "diverged"] = "complete"
    reason = ""
    try:
        device_context = select_device(
            assignment.engine, Path(assignment.home), slot, assignment.micro_batches
        )
        forget_peak(device_context.device)  # an earlier trial's model may have been larger
        contexts = (
            prepare(device_context)
            if prepare is not None
            else prepare_folds(
                assignment.run, device_context, assignment.metric, assignment.direction
            )
        )
        for progress in fit_folds(
            assignment.run,
            contexts,
            Path(assignment.checkpoint_folder) if assignment.checkpoint_folder else None,
            keep_best_weights=assignment.keep_best_weights,
        ):
            best = progress.best
            epochs.append(progress.epoch)
            if not report(progress.epoch):
                state = "stopped"
                break
    except Diverged as error:
        state, reason = "diverged", str(error)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or joined_ranks().count > 1:
            raise  # the launcher of ranks begins again with smaller parts of batches
        # neither best epoch nor context: they have tensors, and the caller frees the memory
        return TrialTraining("oom", str(error).splitlines()[0], epochs, None, None)
    return TrialTraining(state, reason, epochs, best, contexts[0] if contexts else None)


def make_artifacts(training: TrialTraining, metric: str, direction: Direction) -> dict[str, bytes]:
    """The trial's learning curve, and what its task shows of the best epoch; of several folds, of
    the first.
    """
    best, context = training.best, training.context
    if best is None or context is None:
        return {}
    curve = deferred_figures.defer_figure(
        "curve",
        losses=[epoch.loss for epoch in training.epochs],
        scores=[epoch.scores for epoch in training.epochs],
        metric=metric,
        direction=direction,
    )
    if not best.predictions:
        return {"curve.png": curve}
    return {"curve.png": curve, **context.task.make_artifacts(best.predictions, context.dataset)}

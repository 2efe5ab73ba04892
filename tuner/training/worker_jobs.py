"""What workers do: survey a model, inspect data and weights, carry out a trial. Values in, values out."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from tuner import deferred_figures
from tuner.core.weights import is_path
from tuner.files.downloads import forbid_downloads
from tuner.messages import Assignment, DatasetReport, Epoch, ModelSurvey, TrialResult
from tuner.training.building import build_model, build_task, load_dataset
from tuner.training.cross_validation import fit_folds, runs_of_folds
from tuner.training.devices import select_device, select_gpus
from tuner.training.micro_batches import is_out_of_memory, release_memory
from tuner.training.training_loop import BestEpoch, Diverged, check_batch_size


def survey_models(
    assignments: tuple[Assignment, ...], report: Callable[[Any], bool], slot: int
) -> ModelSurvey:
    """How deep each model can be frozen, and how many GPUs are used. Nothing is fetched or written."""
    depths: dict[str, int] = {}
    for a in assignments:
        select_device(
            a.engine, Path(a.home), slot
        )  # names a missing device before anything else happens
        run = a.run.without_weights()
        staged = build_model(run, Path(a.home), 2)
        depths[a.run.model.name] = staged.max_depth
    return ModelSurvey(depths, gpu_count=len(select_gpus(assignments[0].engine)))


def inspect_data(
    assignments: tuple[Assignment, ...], report: Callable[[Any], bool], slot: int
) -> DatasetReport:
    """Reads data and weights of every run as a trial would. Raises DataError, SpaceError."""
    warnings: list[str] = []
    notes: list[str] = []
    for a in assignments:
        local = (
            is_path(str(a.run.model.options.get("weights", "")))
            or a.run.model.options.get("folder") is not None
        )
        with forbid_downloads(not a.allow_downloads):
            for run in runs_of_folds(a.run):
                data = load_dataset(run, Path(a.home))
            staged = build_model(
                a.run if a.allow_downloads or local else a.run.without_weights(),
                Path(a.home),
                len(data.classes),
            )
        warnings += [*data.warnings, *check_batch_size(data, a.run)]
        notes += [f"{a.run.model.name}: {note}" for note in staged.notes]
    return DatasetReport(
        digest=data.digest,
        classes=data.classes,
        split_sizes={"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        input_description=data.input_spec.describe_input(),
        parameter_count=sum(p.numel() for p in staged.model.parameters()),
        warnings=tuple(dict.fromkeys(warnings)),
        notes=tuple(dict.fromkeys(notes)),
    )


def run_trial(assignment: Assignment, report: Callable[[Epoch], bool], slot: int) -> TrialResult:
    """One trial: trains until it ends or `report` says stop."""
    start = time.monotonic()
    epochs: list[Epoch] = []
    best = BestEpoch()
    state: Literal["complete", "stopped", "diverged", "oom"] = "complete"
    reason = ""
    try:
        there = select_device(
            assignment.engine, Path(assignment.home), slot, assignment.micro_batches
        )
        checkpoints = Path(assignment.checkpoint_folder) if assignment.checkpoint_folder else None
        for epoch in fit_folds(
            assignment.run,
            there,
            assignment.metric,
            best,
            checkpoints,
            keep_best_weights=assignment.keep_best_weights,
        ):
            epochs.append(epoch)
            if not report(epoch):
                state = "stopped"
                break
    except Diverged as error:
        state, reason = "diverged", str(error)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        state, reason = "oom", str(error).splitlines()[0]
    if state == "oom":  # outside of the except block, whose traceback holds tensors
        release_memory()
        return TrialResult(state, tuple(epochs), 0, {}, time.monotonic() - start, reason)
    files = make_artifacts(assignment, epochs, best)
    return TrialResult(
        state,
        tuple(epochs),
        best.epoch.number if best.epoch else 0,
        files,
        time.monotonic() - start,
        reason,
    )


def make_artifacts(
    assignment: Assignment, epochs: list[Epoch], best: BestEpoch
) -> dict[str, bytes]:
    """The trial's learning curve, and what its task shows of the best epoch."""
    if best.epoch is None:
        return {}
    data = load_dataset(assignment.run, Path(assignment.home))
    task = build_task(assignment.run, data.classes)
    curve = deferred_figures.defer_figure(
        "curve",
        losses=[e.loss for e in epochs],
        scores=[e.scores for e in epochs],
        metric=assignment.metric,
    )
    return {
        "curve.png": curve,
        **(task.make_artifacts(best.predictions, data) if best.predictions else {}),
    }

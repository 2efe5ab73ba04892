"""What a training costs at each freeze depth, measured on a few examples.

The steps are those of a trial: `fit` trains and validates, on activations in memory where a trial
would read them from the cache, and behind the frozen stages where it would compute them. What the
cache costs is measured by `cache_costs`, once for a machine, as every trial does.
"""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tuner.core.device_memory import peak_bytes
from tuner.messages import DepthCost, ProfileJob, TrainingProfile
from tuner.training.activation_cache import CachedSource
from tuner.training.cache_costs import measure_costs
from tuner.training.devices import select_device
from tuner.training.epoch import TrainingContext, score_source
from tuner.training.largest_batch import largest_batch
from tuner.training.preparation import LoadedRun, few_examples, load_run
from tuner.training.training_loop import fit

BATCHES = 3  # of training examples in a measured epoch
EPOCHS = 2  # of which the quicker one counts: the first warms up


def profile_training(
    job: ProfileJob, report: Callable[[Any], bool], slot: int
) -> tuple[TrainingProfile, ...]:
    """The costs of each run of the job, at each of its depths. Trains nothing that is kept."""
    assignment = job.assignment
    profiles = []
    for run in job.runs:
        begun = time.perf_counter()
        device = select_device(assignment.engine, Path(assignment.home), slot)
        loaded = load_run(run, device, assignment.metric, assignment.direction)
        copied = time.perf_counter()
        loaded = load_run(run, device, assignment.metric, assignment.direction)
        setup = time.perf_counter() - copied  # of a later trial, which finds data and model loaded
        deepest = loaded.staged_model.max_depth
        depths = sorted({min(depth, deepest) for depth in job.depths})
        profiles.append(
            TrainingProfile(
                tuple(profile_depth(loaded, depth) for depth in depths),
                begin_seconds=copied - begun,
                setup_seconds=setup,
                split_sizes={
                    "train": len(loaded.dataset.train),
                    "valid": len(loaded.dataset.valid),
                    "test": len(loaded.dataset.test),
                },
                peak_bytes=peak_memory(device.device),
                largest_batch=largest_batch(loaded, depths[0], assignment.engine.gpu_sharing),
            )
        )
    return tuple(profiles)


def profile_depth(loaded: LoadedRun, depth: int) -> DepthCost:
    """What an example costs at a freeze depth."""
    recipe = loaded.run.recipe.model_copy(
        update={"epochs": EPOCHS, "freeze_depth": depth, "validate_every": 1, "patience": None}
    )
    context = loaded.make_context(depth, recipe)
    computing = reading = size = 0.0
    cached = isinstance(context.train, CachedSource)
    if isinstance(context.train, CachedSource):
        costs = measure_costs(context.train.uncached, context.train.folder)
        computing, reading, size = costs["computing"], costs["reading"], costs["bytes"]
    few = replace(
        context,
        train=few_examples(context.train, BATCHES * recipe.batch_size),
        valid=few_examples(context.valid, BATCHES * recipe.batch_size),
    )
    epoch, valid = time_epoch(few, recipe), time_validation(few, recipe.batch_size)
    train_count, valid_count = len(few.train), len(few.valid)
    return DepthCost(
        depth,
        train_seconds=max(0.0, epoch - valid) / train_count + reading,
        valid_seconds=valid / valid_count + reading,
        fill_seconds=computing,
        cached_bytes=size,
        is_cached=cached,
    )


def time_epoch(context: TrainingContext, recipe: Any) -> float:
    """Seconds of the quickest epoch of a short training, with its validation."""
    epochs = deque(fit(context, recipe, seed=0))
    return min(progress.epoch.seconds for progress in epochs)


def time_validation(context: TrainingContext, batch_size: int) -> float:
    """Seconds in which the validation examples are scored."""
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        score_source(context, context.valid, batch_size)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process had: on the GPU where it uses one, else in main memory."""
    if device.type == "cuda":
        return peak_bytes(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

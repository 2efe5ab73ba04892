"""The row of the GPU kit about bfloat16: losses and scores of whole trainings, against the same trainings in float32."""

import math
import statistics
from collections.abc import Iterator, Sequence

from gpu_measure import Figure, Setup, release
from gpu_training import detector_run, prepare, resnet_run, square

from tuner.config.run import Run
from tuner.training.training_loop import fit

SEEDS = (1, 2, 3)


def precision_row(setup: Setup) -> Iterator[Figure]:
    """The difference of the means over three seeds, in units of its noise."""
    yield from precision_figures(setup, "classification", classifier(setup), "accuracy")
    release()
    yield from precision_figures(setup, "detection", detector(setup), "map")


def classifier(setup: Setup) -> Run:
    number = setup.pick(3, 1)
    limit = setup.pick(1024, 48)
    model = setup.pick("resnet18", "resnet18_slim")
    words = (
        f"model.name={model}",
        f"data.limit={limit}",
        f"recipe.epochs={number}",
        "recipe.lr=0.02",
    )
    return resnet_run(setup, square(setup), *words)


def detector(setup: Setup) -> Run:
    """A small Faster R-CNN from fresh weights, long enough that it finds rectangles."""
    model = setup.pick(
        "{name: fasterrcnn_mobilenet_v3_large_320_fpn, weights: none, backbone: none}",
        "{name: fasterrcnn/timm/mobilenetv3_small_050, backbone: none, regions: 16, proposals: 16}",
    )
    number = setup.pick(12, 1)
    words = (
        "recipe.optimizer=adamw",
        "recipe.lr=0.001",
        "recipe.fit=train",
        f"recipe.epochs={number}",
    )
    words += ("recipe.schedule=cosine", "recipe.warmup=0.1", "recipe.batchnorm=adapt")
    return detector_run(setup, model, setup.pick(160, 64), setup.pick(8, 4), *words)


def precision_figures(setup: Setup, task: str, run: Run, metric: str) -> Iterator[Figure]:
    """A figure for the last epoch's loss and one for its score."""
    ends = {
        precision: [
            last_epoch(setup, run, seed, precision, metric) for seed in SEEDS[: setup.pick(3, 2)]
        ]
        for precision in ("bfloat16", "float32")
    }
    for number, name in enumerate(("loss", metric)):
        low, full = ([end[number] for end in ends[p]] for p in ("bfloat16", "float32"))
        difference = statistics.mean(low) - statistics.mean(full)
        notes = f"difference {difference:+.4f}, noise {noise(low, full):.4f}"
        what = f"{task}: |{name} in bfloat16 - float32| ÷ noise"
        ratio = abs(difference) / noise(low, full) if difference else 0.0
        yield Figure(what, ratio, 1.0, name, low, full, notes=notes)


def noise(low: Sequence[float], full: Sequence[float]) -> float:
    """Two standard errors of the difference of two means. Where no seed differs, the smallest number above 0."""
    squares = statistics.variance(low) / len(low) + statistics.variance(full) / len(full)
    return max(2 * math.sqrt(squares), 1e-12)


def last_epoch(
    setup: Setup, run: Run, seed: int, precision: str, metric: str
) -> tuple[float, float]:
    """Loss and score of a training's last epoch."""
    context = prepare(setup, run, metric, precision=precision)
    *_, last = fit(context, run.recipe, seed)
    return last.epoch.loss, last.epoch.scores[metric]

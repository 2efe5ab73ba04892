"""What tuner's training loop costs for a detector, beside torchvision's own.

    OMP_NUM_THREADS=1 python benchmarks/detector_loop.py RACCOON [--weights tf_efficientnet_lite0.safetensors]

RACCOON is a data set in Pascal VOC's form. Per model, freeze depth (nothing, or the whole backbone) and batch size, two
trainings of the same weights on the same batches take turns, epoch by epoch:

- tuner: `train_one_epoch`, with the frozen backbone computed on the fly, and once more from the cache
- torchvision: the loop of its references/detection/engine.py over images that lie decoded in memory: the model is called
  with lists of images and targets, its GeneralizedRCNNTransform normalises and resizes to the same size, the losses are
  added and read, then backward and SGD. Frozen stages have no gradients and are in eval mode.

Only training is measured, not validation, in seconds of CPU: with one thread these are the seconds of a quiet machine,
and other work beside changes them little. The head learns from few regions of an image (`--regions`; 512 is usual), because
its matrix products, which both loops share, would hide what the loops cost. The first epoch of each is not counted; medians,
least to most.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arms
import torch
from torch import Tensor

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.core.detectors import Objects, unpad_objects
from tuner.core.input_spec import ImageInputSpec
from tuner.engines import _process_settings
from tuner.training.devices import select_device
from tuner.training.epoch import TrainingContext, shuffle_into_batches, train_one_epoch
from tuner.training.optimizers import make_optimizer
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import start_training

_process_settings.keep_freed_memory()  # for both: it is the worker's setting

RESULTS = arms.PLOTS / "detector_loop.json"
SPACE = """
task: detection
data: {name: voc, path: x}
model: {name: x, weights: none}
recipe: {optimizer: sgd, lr: 0.0005, schedule: constant, warmup: 0.0}
"""
MODELS = ("fasterrcnn/timm/tf_efficientnet_lite0", "fasterrcnn_mobilenet_v3_large_320_fpn")
BATCHES = (2, 8)


def make_run(args: argparse.Namespace, model: str, depth: int, batch: int) -> Run:
    backbone = args.weights if "timm" in model and args.weights else "none"
    words = [
        f"data.path={args.data.resolve()}",
        f"data.limit={args.limit}",
        f"data.size={args.size}",
        f"model.name={model}",
        f"model.backbone={backbone}",
        f"recipe.freeze_depth={depth}",
        f"recipe.batch_size={batch}",
        f"recipe.epochs={args.repeats + 1}",
    ]
    document = yaml_document.parse_document(SPACE, "benchmark")
    return parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=1)


def make_context(args: argparse.Namespace, run: Run, cache: str, home: Path) -> TrainingContext:
    engine = EngineSettings.model_validate({"device": "cpu", "cache": cache})
    context = prepare_training(run, select_device(engine, home), "map")
    model: Any = context.staged_model.model
    model.roi_heads.fg_bg_sampler.batch_size_per_image = args.regions
    return context


def tuner_epochs(context: TrainingContext, run: Run) -> Iterator[float]:
    """Seconds of CPU of each training pass by tuner."""
    training = start_training(context, run.recipe, run.seed)
    for epoch in range(1, run.recipe.epochs + 1):
        start = time.process_time()
        train_one_epoch(context, run.recipe, training, run.seed, epoch)
        yield time.process_time() - start


def torchvision_epochs(context: TrainingContext, run: Run) -> Iterator[float]:
    """Seconds of CPU of each training pass by torchvision's loop, over a copy of the model."""
    staged = copy.deepcopy(context.staged_model)
    prefix, _ = staged.split(run.recipe.freeze_depth)
    model: Any = staged.model
    restore_transform(model, context.dataset.input_spec)
    images, targets = decoded_examples(context, first_label=1)
    optimizer = make_optimizer((p for p in model.parameters() if p.requires_grad), run.recipe)
    for epoch in range(1, run.recipe.epochs + 1):
        torch.manual_seed(run.seed * 1_000_003 + epoch)
        batches = shuffle_into_batches(len(images), run.recipe.batch_size, run.seed, epoch)
        start = time.process_time()
        model.train()
        prefix.eval()
        for index in batches:
            rows = index.tolist()
            losses = model([images[i] for i in rows], [targets[i] for i in rows])
            total = sum(losses.values())
            if not math.isfinite(total.item()):
                raise SystemExit(f"the loss is {total.item()}")
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        yield time.process_time() - start


def restore_transform(model: Any, spec: Any) -> None:
    """Switch torchvision's own normalising, resizing and padding on again."""
    assert isinstance(spec, ImageInputSpec)
    model.transform.image_mean = list(spec.mean)
    model.transform.image_std = list(spec.std)
    model.transform.fixed_size = (spec.size, spec.size)
    model.transform.size_divisible = 32


def decoded_examples(
    context: TrainingContext, first_label: int
) -> tuple[list[Tensor], list[Objects]]:
    """The training images, float32 (3, side, side) in 0..1, and their objects, in memory."""
    source = context.dataset.train
    x, y = source.take(torch.arange(len(source)), 0)
    assert isinstance(x, Tensor) and isinstance(y, dict)
    objects = unpad_objects(y["boxes"], y["labels"])
    targets = [{**each, "labels": each["labels"] + first_label} for each in objects]
    return list(x.float() / 255), targets


def measure(args: argparse.Namespace, model: str, depth: int, batch: int, home: Path) -> Any:
    """Seconds of the counted epochs of each arm."""
    run = make_run(args, model, depth, batch)
    context = make_context(args, run, "never", home)
    epochs = {
        "torchvision": torchvision_epochs(context, run),
        "tuner": tuner_epochs(context, run),
    }
    if depth:
        epochs["cached"] = tuner_epochs(make_context(args, run, "always", home), run)
    seconds: dict[str, list[float]] = {arm: [] for arm in epochs}
    for number in range(args.repeats + 1):
        for arm in list(epochs)[:: 1 if number % 2 else -1]:
            seconds[arm].append(next(epochs[arm]))
    return {
        "cell": [model, depth, batch],
        "images": len(context.train),
        "seconds": {arm: values[1:] for arm, values in seconds.items()},
    }


def backbone_depth(args: argparse.Namespace, model: str, home: Path) -> int:
    """The freeze depth at which all stages before the feature pyramid are frozen."""
    context = make_context(args, make_run(args, model, 0, 2), "never", home)
    return list(context.staged_model.stages).index("fpn")


def print_table(results: dict[str, Any]) -> None:
    print(f"{results['hardware']}; {results['settings']}\n")
    print(
        "| model | freeze depth | batch | torchvision, s an image | tuner, s an image | tuner / torchvision | cached, s an image | cached / torchvision |"
    )
    print(f"|{'---|' * 8}")
    for row in results["rows"]:
        model, depth, batch = row["cell"]
        images = row["images"]
        per_image = {arm: [s / images for s in each] for arm, each in row["seconds"].items()}
        median = {arm: statistics.median(each) for arm, each in per_image.items()}
        cells = [
            arms.spread(per_image["torchvision"], 3),
            arms.spread(per_image["tuner"], 3),
            f"{median['tuner'] / median['torchvision']:.3f}",
        ]
        if "cached" in median:
            ratio = median["cached"] / median["torchvision"]
            cells += [arms.spread(per_image["cached"], 3), f"{ratio:.3f}"]
        else:
            cells += ["", ""]
        print(f"| {model} | {depth} | {batch} | {' | '.join(cells)} |", flush=True)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "hardware": arms.hardware(),
        "settings": f"{args.size} pixels, {torch.get_num_threads()} thread(s), "
        f"n = {args.repeats} epochs of {args.limit} images, {args.regions} regions of each",
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=args.scratch) as home:
        for model in args.models:
            depths = (0, backbone_depth(args, model, Path(home)))
            for depth, batch in itertools.product(depths, args.batches):
                results["rows"].append(measure(args, model, depth, batch, Path(home)))
                arms.save(results, RESULTS)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of tf_efficientnet_lite0")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--limit", type=int, default=16, help="training images")
    parser.add_argument("--regions", type=int, default=64, help="from which a head learns")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only and args.data is None:
        parser.error("name the data, unless --table-only")
    print_table(json.loads(RESULTS.read_text()) if args.table_only else measure_all(args))


if __name__ == "__main__":
    main()

"""What an epoch of a U-Net costs when its encoder is frozen and remembered, beside the same on the fly and nothing frozen.

    python benchmarks/unet.py FOLDER [--images images] [--masks masks] [--size 128] [--model unet/resnet18] [--repeats 3]

FOLDER holds a folder of images and one of masks. All arms go on in one process, an epoch of each in turn, so that whatever else the
machine does falls on all alike; the first epoch of each, which fills the cache, is left out. Every epoch validates too. Weights are
drawn at random: seconds do not depend on them.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from arms import hardware, spread

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.engines import _process_settings
from tuner.training.devices import select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import FitProgress, fit

_process_settings.keep_freed_memory()  # for all: it is the worker's setting
SPACE = """
task: {name: segmentation, loss: dice}
data: {name: masks, path: x}
model: {name: unet/resnet18, weights: none}
recipe: {optimizer: adamw, lr: 2.0e-4, batch_size: 16}
"""


def run(args: argparse.Namespace, depth: int) -> Run:
    words = [
        f"data.path={args.folder}",
        f"data.images={args.images}",
        f"data.masks={args.masks}",
        f"data.size={args.size}",
    ]
    words += [
        f"model.name={args.model}",
        f"recipe.freeze_depth={depth}",
        f"recipe.epochs={args.repeats + 1}",
    ]
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SPACE, "benchmark"), words)
    ).sample(None, seed=1)


def arm(args: argparse.Namespace, depth: int, cache: str, home: Path) -> Iterator[FitProgress]:
    r = run(args, depth)
    return fit(
        prepare_training(
            r,
            select_device(EngineSettings.model_validate({"cache": cache, "device": "cpu"}), home),
            "mean_iou",
        ),
        r.recipe,
        r.seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", default="images")
    parser.add_argument("--masks", default="masks")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--model", default="unet/resnet18")
    parser.add_argument(
        "--encoder", type=int, default=5, help="the depth at which the whole encoder is frozen"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{args.model}, {args.size} px, {hardware()}, n = {args.repeats} epochs: median (least to most), interleaved\n"
    )
    arms = {
        "nothing frozen": (0, "never"),
        "encoder frozen, on the fly": (args.encoder, "never"),
        "encoder frozen, remembered": (args.encoder, "always"),
        "encoder and decoder frozen, remembered": (args.encoder + 1, "always"),
    }
    with tempfile.TemporaryDirectory() as home:
        running = {
            name: arm(args, depth, cache, Path(home)) for name, (depth, cache) in arms.items()
        }
        first = {name: next(training).epoch.seconds for name, training in running.items()}
        later: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(args.repeats):
            for name, training in running.items():
                later[name].append(next(training).epoch.seconds)
    whole = statistics.median(later["nothing frozen"])
    print("| arm | first epoch, s | later epochs, s | ÷ nothing frozen |\n|---|---|---|---|")
    for name, seconds in later.items():
        print(
            f"| {name} | {first[name]:.2f} | {spread(seconds, 2)} | {statistics.median(seconds) / whole:.2f} |"
        )


if __name__ == "__main__":
    main()

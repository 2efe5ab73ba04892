"""What an epoch costs at each freeze depth, remembered and computed on the fly, in one run, interleaved.

    python benchmarks/frozen_epoch.py FOLDER [--limit 3000] [--size 64] [--model resnet18_slim] [--repeats 3]

FOLDER is an image folder, such as CIFAR-10's train/ with one folder per class. The first epoch at a depth fills the cache
and is reported apart; the others are what every later epoch of every later trial costs.
"""

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import torch

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.training.devices import select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

SPACE = """
task: classification
data: {name: folder, path: x}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: sgd, lr: 0.01, batch_size: 64, head: fresh}
"""


def run(args: argparse.Namespace, depth: int) -> Run:
    words = [
        f"data.path={args.folder}",
        f"data.limit={args.limit}",
        f"data.size={args.size}",
        f"model.name={args.model}",
    ]
    words += [f"recipe.freeze_depth={depth}", f"recipe.epochs={args.repeats}"]
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SPACE, "benchmark"), words)
    ).sample(None, seed=1)


def epochs(args: argparse.Namespace, depth: int, cache: str, home: Path) -> list[float]:
    r = run(args, depth)
    bench = prepare_training(
        r, select_device(EngineSettings.model_validate({"cache": cache}), home), "accuracy"
    )
    return [progress.epoch.seconds for progress in fit(bench, r.recipe, r.seed)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=3000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--model", default="resnet18_slim")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    )
    print(
        f"{args.model}, {args.size} px, up to {args.limit} training images, {device}, torch {torch.__version__}, n = {args.repeats} epochs\n"
    )
    print(
        "| freeze depth | on the fly, s | remembered, first, s | remembered, later, s | later / depth 0 on the fly |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as home:
        whole = statistics.median(epochs(args, 0, "never", Path(home)))
        for depth in range(6):
            live = statistics.median(epochs(args, depth, "never", Path(home)))
            first, *_ = epochs(args, depth, "auto", Path(home))
            later = statistics.median(epochs(args, depth, "auto", Path(home)))
            print(
                f"| {depth} | {live:.3f} | {first:.3f} | {later:.3f} | {later / whole:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

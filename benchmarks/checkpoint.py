"""What checkpoints cost: the seconds of an epoch without them, with them as they are, and with one written after every epoch.

    python benchmarks/checkpoint.py [--size 64] [--repeats 7]

One run, the three kinds interleaved, medians over the repeats. A head over remembered activations (epochs of milliseconds, the whole
training is shorter than what is at stake), and the whole network trained (weights, AdamW's two moments and the best epoch's weights are
written). Data: scikit-learn's digits; model: resnet18_slim. `written` counts the files of one training.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tuner import checkpoints, document, machine, parsing
from tuner.checkpoints import Checkpoints
from tuner.devices import place
from tuner.run import Engine, Run
from tuner.trial import checkpoints_of, fit, prepare

SPACE = """
task: classification
data: {name: digits}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: adamw, lr: 0.001, batch_size: 64}
"""
CASES = {"a head, remembered activations": (5, 100), "the whole network": (0, 3)}  # freeze depth, epochs
KINDS = {"none": None, "as they are": checkpoints.STAKE, "every epoch": 0.0}


def run(args: argparse.Namespace, depth: int, epochs: int) -> Run:
    words = [f"data.size={args.size}", f"recipe.freeze_depth={depth}", f"recipe.epochs={epochs}"]
    return parsing.parse(parsing.override(document.parse(SPACE, "benchmark"), words)).sample(None, seed=1)


def training(r: Run, home: Path, stake: float | None) -> tuple[float, int, float]:
    """Seconds of an epoch, checkpoints written, and megabytes of the last."""
    bench = prepare(r, place(Engine(), home), "accuracy")
    with tempfile.TemporaryDirectory(dir=home) as folder:
        kept = checkpoints_of(r, bench, Path(folder) / "kept") if stake is not None else None
        checkpoints.STAKE = stake or 0.0
        count = counted(kept)
        start = time.perf_counter()
        for _ in fit(bench, r.recipe, r.seed, checkpoints=kept):
            pass
        seconds = (time.perf_counter() - start) / r.recipe.epochs
        sizes = [path.stat().st_size / 1e6 for path in Path(folder).rglob("*.safetensors")]
        return seconds, len(count), max(sizes, default=0.0)


def counted(kept: Checkpoints | None) -> list[Path]:
    """A list that grows with each file written."""
    found: list[Path] = []
    if kept is not None:
        real = kept.write
        kept.write = lambda *words, **more: found.append(real(*words, **more)) or found[-1]  # type: ignore[method-assign, func-returns-value]
    return found


def rows(args: argparse.Namespace, home: Path) -> Iterator[str]:
    for name, (depth, epochs) in CASES.items():
        r = run(args, depth, epochs)
        training(r, home, None)  # fills the cache
        took: dict[str, list[tuple[float, int, float]]] = {kind: [] for kind in KINDS}
        for _ in range(args.repeats):
            for kind, stake in KINDS.items():
                took[kind].append(training(r, home, stake))
        plain = statistics.median(seconds for seconds, _, _ in took["none"])
        for kind, found in took.items():
            seconds = statistics.median(seconds for seconds, _, _ in found)
            spread = f"{1000 * min(found)[0]:.1f} to {1000 * max(found)[0]:.1f}"
            written, size = found[-1][1:]
            yield f"| {name} | {kind} | {1000 * seconds:.1f} | {spread} | {seconds / plain - 1:+.1%} | {written} of {epochs} | {size:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    machine.keep_memory()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    print(f"resnet18_slim, digits at {args.size} px, {device}, torch {torch.__version__}, n = {args.repeats}\n")
    print("| trained | checkpoints | ms an epoch | lowest to highest | more | written | MB |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        for row in rows(args, Path(home)):
            print(row, flush=True)


if __name__ == "__main__":
    main()

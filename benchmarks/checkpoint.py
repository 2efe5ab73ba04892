"""What checkpoints cost: the seconds of an epoch without them, with them as they are, and with one written after every epoch.

    python benchmarks/checkpoint.py [--size 64] [--repeats 7]

One run, the three kinds interleaved, medians over the repeats; `saving` is timed by itself, as a busy machine blurs the rest. A head over remembered activations (epochs of milliseconds, the whole
training is shorter than what is at stake), and the whole network trained (weights, AdamW's two moments and the best epoch's weights are
written). Data: scikit-learn's digits; model: resnet18_slim.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.engines import _process_settings
from tuner.training import checkpoints
from tuner.training.checkpoints import Checkpoints
from tuner.training.devices import select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

SPACE = """
task: classification
data: {name: digits}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: adamw, lr: 0.001, batch_size: 64}
"""
CASES = {
    "a head, remembered activations": (5, 100),
    "the whole network": (0, 3),
}  # freeze depth, epochs
KINDS = {"none": None, "as they are": checkpoints.MIN_WRITE_SECONDS, "every epoch": 0.0}


def run(args: argparse.Namespace, depth: int, epochs: int) -> Run:
    words = [f"data.size={args.size}", f"recipe.freeze_depth={depth}", f"recipe.epochs={epochs}"]
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SPACE, "benchmark"), words)
    ).sample(None, seed=1)


@dataclass
class Took:
    """Milliseconds an epoch, of which `saving`; checkpoints `written`, and the largest in megabytes."""

    epoch: float
    saving: float
    written: int
    size: float


class Timed(Checkpoints):
    """Checkpoints that say what they take."""

    spent, files = 0.0, 0

    def save_if_due(self, *words: Any) -> None:
        start = time.perf_counter()
        super().save_if_due(*words)
        self.spent += time.perf_counter() - start

    def write_file(self, *words: Any, **more: Any) -> Path:
        self.files += 1
        return super().write_file(*words, **more)


def training(r: Run, home: Path, stake: float | None) -> Took:
    bench = prepare_training(r, select_device(EngineSettings(), home), "accuracy")
    with tempfile.TemporaryDirectory(dir=home) as folder:
        kept = Timed(Path(folder) / "kept", "this") if stake is not None else None
        checkpoints.MIN_WRITE_SECONDS = stake or 0.0
        start = time.perf_counter()
        deque(fit(bench, r.recipe, r.seed, checkpoints=kept), maxlen=0)
        took = time.perf_counter() - start
        size = max(
            (path.stat().st_size / 1e6 for path in Path(folder).rglob("*.safetensors")), default=0.0
        )
    spent, written = (kept.spent, kept.files) if kept is not None else (0.0, 0)
    return Took(1000 * took / r.recipe.epochs, 1000 * spent / r.recipe.epochs, written, size)


def rows(args: argparse.Namespace, home: Path) -> Iterator[str]:
    for name, (depth, epochs) in CASES.items():
        r = run(args, depth, epochs)
        training(r, home, None)  # fills the cache
        found: dict[str, list[Took]] = {kind: [] for kind in KINDS}
        for _ in range(args.repeats):
            for kind, stake in KINDS.items():
                found[kind].append(training(r, home, stake))
        for kind, took in found.items():
            each = sorted(t.epoch for t in took)
            epoch, saving = statistics.median(each), statistics.median(t.saving for t in took)
            share = statistics.median(t.saving / t.epoch for t in took)
            written = f"{took[-1].written} of {epochs}"
            yield f"| {name} | {kind} | {epoch:.1f} ({each[0]:.1f} to {each[-1]:.1f}) | {saving:.2f} | {share:.1%} | {written} | {took[-1].size:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    _process_settings.keep_freed_memory()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    )
    print(
        f"resnet18_slim, digits at {args.size} px, {device}, torch {torch.__version__}, n = {args.repeats}\n"
    )
    print(
        "| trained | checkpoints | ms an epoch | of these saving | share | written | MB |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as home:
        for row in rows(args, Path(home)):
            print(row, flush=True)


if __name__ == "__main__":
    main()

"""What a frozen backbone saves on texts, and what tuner's loop costs beside a bare one of PyTorch and transformers.

    python benchmarks/bert.py FILE FOLDER [--limit 2000] [--length 64] [--batch 16] [--repeats 3] [--depths 2 4]

FILE holds texts with labels, such as SMSSpamCollection; FOLDER a BERT with its tokenizer, such as all-MiniLM-L6-v2. In one process,
in turn, after one epoch of each that is not counted; an epoch trains and looks at the validation texts; medians, least to most.

(a) An epoch with some stages frozen (`--depths`; by default all but the head), once from the cache and once computed on the fly,
    against an epoch with nothing frozen.
(b) The same epoch with nothing frozen, against the library's own model, tokenizer and loss in a bare loop over the same batches,
    padded alike: to the longest text of the batch, rounded up to 8.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.engines import _process_settings
from tuner.files.cache_entries import disk_usage
from tuner.preprocessing import tokenization
from tuner.training import epoch as learning
from tuner.training import preparation, training_loop
from tuner.training.devices import select_device
from tuner.training.optimizers import lr_factor, make_optimizer

_process_settings.keep_freed_memory()  # for all: it is the worker's setting
SPACE = """
task: text_classification
data: {name: text, path: x}
model: {name: bert, folder: x}
recipe: {head: fresh}
"""


def run(args: argparse.Namespace, depth: int) -> Run:
    words = [
        f"data.path={args.file}",
        f"data.limit={args.limit}",
        f"model.folder={args.folder}",
        f"model.length={args.length}",
    ]
    words += [
        f"recipe.freeze_depth={depth}",
        f"recipe.epochs={args.repeats + 1}",
        f"recipe.batch_size={args.batch}",
    ]
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SPACE, "benchmark"), words)
    ).sample(None, seed=1)


def bench(
    args: argparse.Namespace, depth: int, cache: str, home: Path
) -> training_loop.TrainingContext:
    return preparation.prepare_training(
        run(args, depth),
        select_device(EngineSettings.model_validate({"device": "cpu", "cache": cache}), home),
        "accuracy",
    )


def ours(made: training_loop.TrainingContext, r: Run) -> Iterator[float]:
    """Seconds of each epoch by tuner."""
    for progress in training_loop.fit(made, r.recipe, r.seed):
        yield progress.epoch.seconds


def bare(args: argparse.Namespace, made: training_loop.TrainingContext, r: Run) -> Iterator[float]:
    """Seconds of each epoch by hand: the library's model and loss over tensors that lie ready in memory, each batch cut to its longest."""
    from transformers import AutoModelForSequenceClassification

    with tokenization.silence_transformers():
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            args.folder, num_labels=len(made.dataset.classes), dtype=torch.float32
        )
    train, valid = (
        source.take(torch.arange(len(source)), 0)
        for source in (made.dataset.train, made.dataset.valid)
    )
    lengths = made.dataset.train.lengths
    opt = make_optimizer(model, r.recipe)
    steps = r.recipe.epochs * len(
        training_loop.shuffle_into_batches(len(train.y), args.batch, r.seed, 1, lengths)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: lr_factor(r.recipe, step, steps))

    def inputs(x: Any, index: torch.Tensor) -> dict[str, torch.Tensor]:
        longest = int(x["attention_mask"][index].sum(1).max())
        keep = min(args.length, -(-longest // 8) * 8)
        return {name: leaf[index, :keep] for name, leaf in x.items()}

    for epoch in range(1, r.recipe.epochs + 1):
        start = time.monotonic()
        model.train()
        for index in training_loop.shuffle_into_batches(
            len(train.y), args.batch, r.seed, epoch, lengths
        ):
            loss = model(**inputs(train.x, index), labels=train.y[index]).loss  # type: ignore[call-overload]
            opt.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), r.recipe.clip_norm or 1.0)
            opt.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            chunks = torch.arange(len(valid.y)).split(learning.MAX_EVAL_BATCH)
            said = torch.cat([model(**inputs(valid.x, index)).logits for index in chunks])
        float((said.argmax(1) == valid.y).float().mean())  # type: ignore[union-attr]
        yield time.monotonic() - start


def fill(cached: training_loop.TrainingContext) -> str:
    """Fills the cache at the first read; the seconds and the bytes of a text, in words."""
    start = time.monotonic()
    for source in (cached.train, cached.valid):
        source.take(torch.tensor([0]), 0)
    seconds = time.monotonic() - start
    folder = cached.device_context.cache_limits.home / "activations"
    return f"{seconds:.1f} s, {disk_usage(folder) / 1e6:.1f} MB on the disk so far"


@dataclass
class Arm:
    """An iterator that trains an epoch and gives its seconds; and what it gave."""

    epochs: Iterator[float]
    seconds: list[float] = field(default_factory=list)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="+")
    args = parser.parse_args()
    print(
        f"{args.folder.name}, {args.length} tokens, up to {args.limit} training texts, batches of {args.batch}, "
        f"{torch.get_num_threads()} CPU threads ({platform.machine()}), torch {torch.__version__}, n = {args.repeats} epochs\n"
    )
    with tempfile.TemporaryDirectory() as home:
        whole = bench(args, 0, "never", Path(home))
        arms: dict[str, Arm] = {}
        fillings = []
        for depth in args.depths or [whole.staged_model.max_depth]:
            cached = bench(args, depth, "always", Path(home))
            fillings.append(f"depth {depth}: {fill(cached)}")
            arms[f"(a) depth {depth}, cached"] = Arm(ours(cached, run(args, depth)))
            on_the_fly = bench(args, depth, "never", Path(home))
            arms[f"(a) depth {depth}, on the fly"] = Arm(ours(on_the_fly, run(args, depth)))
        arms["nothing frozen"] = Arm(ours(whole, run(args, 0)))
        arms["(b) the library's own, bare loop"] = Arm(bare(args, whole, run(args, 0)))
        for number in range(args.repeats + 1):
            for arm in list(arms.values())[:: 1 if number % 2 else -1]:
                arm.seconds.append(next(arm.epochs))
    base = statistics.median(arms["nothing frozen"].seconds[1:])
    print("| epoch | seconds | ÷ nothing frozen |\n|---|---|---|")
    for name, arm in arms.items():
        median = statistics.median(arm.seconds[1:])
        print(f"| {name} | {spread(arm.seconds[1:])} | {median / base:.4f} |")
    print(f"\nfilling the cache, once: {'; '.join(fillings)}")


if __name__ == "__main__":
    main()

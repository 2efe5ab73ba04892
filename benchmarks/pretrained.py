"""Does fine-tuning the embedded weights beat training from scratch, on few labelled digits and at equal epochs?

    python benchmarks/pretrained.py [--seeds 5]

Each arm gets the same images, epochs, batch size and learning rates, and is judged at the learning rate that is best for it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings
from tuner.training.devices import select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, predict_source

SPACE = """
task: classification
data: {name: digits, size: 32, valid: 0.47, test: 0.47}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: sgd, momentum: 0.9, epochs: 10, batch_size: 16, schedule: cosine, head: fresh}
"""
RATES = (0.003, 0.01, 0.03, 0.1)


def accuracy(weights: str, lr: float, seed: int, home: Path) -> tuple[float, int]:
    """Test accuracy of the last epoch, and the number of training images."""
    words = [f"model.weights={weights}", f"recipe.lr={lr}", f"seed={seed}", f"data.seed={seed}"]
    run = parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(SPACE, "benchmark"), words)
    ).sample(None)
    bench = prepare_training(run, select_device(EngineSettings(device="cpu"), home), "accuracy")
    list(fit(bench, run.recipe, run.seed))
    return bench.task.score(predict_source(bench, bench.test, run.recipe.batch_size))[
        "accuracy"
    ], len(bench.train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    with tempfile.TemporaryDirectory() as home:
        print(
            "| weights | lr | test accuracy, mean | standard deviation | each seed |\n|---|---|---|---|---|"
        )
        best = {}
        for lr in RATES:
            for weights in ("bundled", "none"):
                found = [accuracy(weights, lr, seed, Path(home)) for seed in seeds]
                scores = [score for score, _ in found]
                best[weights] = max(best.get(weights, (0.0, 0.0)), (statistics.mean(scores), lr))
                told = " ".join(f"{s:.3f}" for s in scores)
                print(
                    f"| {weights} | {lr:g} | {statistics.mean(scores):.4f} | {statistics.stdev(scores):.4f} | {told} |",
                    flush=True,
                )
    images = found[0][1]
    print(
        f"\nbest of {len(RATES)} learning rates, {images} training images, n = {len(seeds)}: "
        f"bundled {best['bundled'][0]:.4f} (lr {best['bundled'][1]:g}), from scratch {best['none'][0]:.4f} (lr {best['none'][1]:g})"
    )


if __name__ == "__main__":
    main()

"""How well `tuner models --for` chooses: its scores against full fine-tuning of every candidate.

    python benchmarks/model_choice.py LITE0.safetensors FOLDER... [--examples 300] [--epochs 6] [--size 64]

FOLDERs hold images by class. Two real networks are here without a hub: the bundled resnet18_slim and timm's EfficientNet-Lite0. So the
candidates are these two, the first blocks of Lite0 (cut after 3, 5 and 6 of its 7, with their pretrained weights), and both networks
with random weights, which a good score must put last. Each is scored as `tuner models --for` does, and fine-tuned whole, from the
linear probe, by the default recipe with so many epochs; the accuracy on the test examples decides. Spearman's rank correlation over
the candidates, and the regret: the best candidate's test accuracy minus that of the first choice. Few candidates, and most of them
parts of one network: this says whether the scores go in the right direction, and little about a choice among many good models.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import scipy.stats
import timm
import torch
from torch import nn

from tuner.api import ImageInputSpec, StagedModel
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.config.space import dump_yaml
from tuner.core.weights import read_state_dict
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import predict_source
from tuner.training.model_scores import score_model
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

LITE0 = "timm/tf_efficientnet_lite0"
HERE = "model_choice"  # this module, as a plug-in names it


def input_spec() -> ImageInputSpec:
    return ImageInputSpec(224, 256, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def first_blocks(count: int) -> Callable[[int], StagedModel]:
    """Lite0 up to a block, with its weights, a pooling and a new head."""

    def build(outputs: int) -> StagedModel:
        whole = timm.create_model("tf_efficientnet_lite0")
        whole.load_state_dict(read_state_dict(Path(os.environ["LITE0"])))
        blocks = list(whole.blocks)[:count]
        with torch.no_grad():
            x = whole.bn1(whole.conv_stem(torch.zeros(1, 3, 64, 64)))
            for block in blocks:
                x = block(x)
            width = x.shape[1]
        stages = OrderedDict(stem=nn.Sequential(whole.conv_stem, whole.bn1))
        stages |= {f"block{i}": block for i, block in enumerate(blocks)}
        stages[f"block{count - 1}"] = nn.Sequential(
            blocks[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        stages["head"] = nn.Linear(width, outputs)
        return StagedModel(nn.Sequential(stages), stages)

    return build


first_3, first_5, first_6 = map(first_blocks, (3, 5, 6))


def candidates(lite0: str) -> dict[str, dict[str, str]]:
    return {
        "Lite0": {"name": LITE0, "weights": lite0},
        "Lite0, 6 of 7 blocks": {"name": f"{HERE}:first_6"},
        "Lite0, 5 of 7 blocks": {"name": f"{HERE}:first_5"},
        "Lite0, 3 of 7 blocks": {"name": f"{HERE}:first_3"},
        "resnet18_slim": {"name": "resnet18_slim", "weights": "bundled"},
        "Lite0, random": {"name": LITE0, "weights": "none"},
        "resnet18_slim, random": {"name": "resnet18_slim", "weights": "none"},
    }


def make_run(args: argparse.Namespace, folder: str, model: dict[str, str]) -> Run:
    data = {"name": "folder", "path": folder, "size": args.size, "limit": args.examples}
    recipe = {"epochs": args.epochs, "batch_size": 32}
    content = {"task": "classification", "data": data, "model": model, "recipe": recipe}
    return parsing.parse_space(yaml_document.parse_document(dump_yaml(content), "run")).sample(
        None, 0
    )


def fine_tune(run: Run, here: DeviceContext) -> float:
    """The accuracy on the test examples of the best epoch's weights."""
    context = prepare_training(run, here, "accuracy")
    for _ in fit(context, run.recipe, run.seed):
        pass
    return context.task.score(predict_source(context, context.test, 64))["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lite0")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    os.environ["LITE0"] = args.lite0
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    print(
        f"{args.examples} examples of each split, {args.size} pixels, {args.epochs} epochs, {platform.machine()}"
    )
    for folder in args.folders:
        print(
            f"\n{Path(folder).name}\n\n| model | probe | LogME | fine-tuned, test | s to score | s to tune |\n|---|---|---|---|---|---|",
            flush=True,
        )
        probes, evidences, tuned = [], [], []
        with tempfile.TemporaryDirectory() as home:
            here = select_device(EngineSettings(device="cpu"), Path(home))
            for label, model in candidates(args.lite0).items():
                run = make_run(args, folder, model)
                start = time.process_time()
                score = score_model(run, here)
                scored = time.process_time()
                tuned.append(fine_tune(run, here))
                probes.append(score.probe["accuracy"])
                evidences.append(score.logme)
                print(
                    f"| {label} | {probes[-1]:.4f} | {score.logme:.3f} | {tuned[-1]:.4f} | {scored - start:.1f} | "
                    f"{time.process_time() - scored:.1f} |",
                    flush=True,
                )
        for name, scores in (("probe", probes), ("LogME", evidences)):
            rank = scipy.stats.spearmanr(scores, tuned).statistic
            first = max(range(len(scores)), key=scores.__getitem__)
            print(
                f"{name}: rank correlation {rank:.2f}, regret {max(tuned) - tuned[first]:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""fastai's `fine_tune` at its defaults: what many people type first. One training, no search.

    python benchmarks/plain_fastai.py FOLDER --weights lite0.safetensors --probabilities OUT.json [--epochs 4] [--size 96]

Needs fastai: `pip install fastai`. The data blocks are those of its book: `Resize` per image, `aug_transforms` per batch. The
model is timm's by name, with the same weights as the other arms; fastai puts its own head on it, trains it alone for an
epoch, and then everything for `--epochs` epochs. It takes no validation example to choose from.
"""

import argparse
import json
import warnings
from pathlib import Path

import twins

warnings.filterwarnings("ignore")  # fastai's own, about the versions of others
from fastai.vision.all import (  # noqa: E402
    ImageDataLoaders,
    Resize,
    accuracy,
    aug_transforms,
    set_seed,
    vision_learner,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--probabilities", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--size", type=int, default=twins.SIZE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    data = ImageDataLoaders.from_folder(
        args.folder,
        train="train",
        valid="valid",
        item_tfms=Resize(args.size),
        batch_tfms=aug_transforms(),
        bs=twins.BATCH,
        num_workers=0,
    )
    learner = vision_learner(
        data,
        twins.MODEL,
        metrics=accuracy,
        pretrained_cfg_overlay={"file": str(args.weights)},
    )
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(args.epochs)
        files = sorted((args.folder / "test").rglob("*.jpg"))
        probabilities, _ = learner.get_preds(dl=data.test_dl(files))
    classes = list(data.vocab)
    rows = [
        [classes.index(file.parent.name), values.tolist()]
        for file, values in zip(files, probabilities, strict=True)
    ]
    args.probabilities.write_text(json.dumps({"classes": classes, "rows": rows}))


if __name__ == "__main__":
    main()

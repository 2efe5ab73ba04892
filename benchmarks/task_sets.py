"""The sets of quality_tasks.py: boxes, masks and texts, each drawn anew for each seed.

Files of equal content are one example, and so are equal messages, so that no test example is a training example. The
layouts are those that `tuner` and the plain scripts read:

    boxes   OUT/JPEGImages, OUT/Annotations/*.xml, OUT/ImageSets/Main/{train,val,test}.txt   (Pascal VOC)
    masks   OUT/{train,valid,test}/{images,masks}
    texts   OUT/{train,valid,test}.csv with the columns text and label
"""

import csv
import hashlib
import itertools
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PARTS = ("train", "valid", "test")
MODEL = "tf_efficientnet_lite0"
Boxes = list[tuple[str, tuple[float, float, float, float]]]


@dataclass(frozen=True)
class TaskSet:
    """A set, what every arm trains on it with, and the scores that are to be reached.

    Args:
        kind: boxes, masks or texts.
        source: the folder or file below DATA.
        counts: examples of each part, of test and valid first; None: all that are left.
        space: the shipped space file.
        size: pixels of the longer side, or tokens.
        epochs: the longest training of every arm.
        trials: of tuner and of the plain search.
        goals: the least mean of a score over the seeds.
        keys: what the space file is told beyond path, weights and size, by section.
        plain: further options of the plain script.
    """

    kind: str
    source: str
    counts: Mapping[str, int | None]
    space: str
    size: int
    epochs: int
    trials: int
    goals: Mapping[str, float]
    keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plain: tuple[str, ...] = ()


# of an image, from which the head learns: with the usual 512 its matrix products dominate on a CPU
REGIONS = 64
DETECTOR = {
    "model": {"name": f"fasterrcnn/timm/{MODEL}", "regions": REGIONS, "proposals": 100},
    "recipe": {"freeze_depth": {"low": 4, "high": 8}},  # half of the backbone at least
    "search": {
        "retrain": False
    },  # an epoch takes half a minute and more: as the plain script, which does not retrain
}
DETECTION = ("--regions", str(REGIONS), "--proposals", "100")
SETS = {
    "raccoon": TaskSet(
        "boxes",
        "raccoon",
        {"test": 40, "valid": 30, "train": None},
        space="fasterrcnn",
        size=192,
        epochs=8,
        trials=2,
        goals={"map": 0.50},
        keys=DETECTOR,
        plain=DETECTION,
    ),
    "bccd": TaskSet(
        "boxes",
        "bccd",
        {"test": 72, "valid": 40, "train": 120},
        space="fasterrcnn",
        size=256,
        epochs=3,
        trials=2,
        goals={"map_50": 0.80},
        keys=DETECTOR,
        plain=DETECTION,
    ),
    "humans": TaskSet(
        "masks",
        "humans",
        {"test": 44, "valid": 44, "train": None},
        space="unet",
        size=224,
        epochs=6,
        trials=2,
        goals={"mean_iou": 0.90},
        keys={"model": {"name": f"unet/tu-{MODEL}"}},
    ),
    "sms": TaskSet(
        "texts",
        "SMSSpamCollection",
        {"test": 1500, "valid": 250, "train": 500},
        space="bert",
        size=64,
        epochs=4,
        trials=8,
        goals={},
        keys={"recipe": {"freeze_depth": {"low": 0, "high": 7}}},  # embeddings and six blocks
    ),
}


def make_set(name: str, data: Path, out: Path, seed: int) -> dict[str, int]:
    """Writes a set below OUT; how many examples each part has."""
    chosen = SETS[name]
    rng = random.Random(seed)
    source = data / chosen.source
    return {"boxes": _make_boxes, "masks": _make_masks, "texts": _make_texts}[chosen.kind](
        source, out, chosen.counts, rng
    )


def _make_boxes(
    source: Path, out: Path, counts: Mapping[str, int | None], rng: random.Random
) -> dict[str, int]:
    images = {file.stem: file for file in _first_of_each(_inside(source, "JPEGImages", "images"))}
    notes = {file.stem: file for file in _inside(source, "Annotations", "annotations")}
    parts = _divide(sorted(images.keys() & notes.keys()), counts, rng)
    for folder, files in (("JPEGImages", images), ("Annotations", notes)):
        for stem in itertools.chain(*parts.values()):
            _link(files[stem], out / folder / files[stem].name)
    lists = out / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for part, stems in parts.items():
        (lists / f"{'val' if part == 'valid' else part}.txt").write_text("\n".join(stems) + "\n")
    return {part: len(parts[part]) for part in PARTS}


def _make_masks(
    source: Path, out: Path, counts: Mapping[str, int | None], rng: random.Random
) -> dict[str, int]:
    images = {file.stem: file for file in _first_of_each(_inside(source, "Training_Images"))}
    masks = {file.stem: file for file in _inside(source, "Ground_Truth")}
    parts = _divide(sorted(images.keys() & masks.keys()), counts, rng)
    for part, stems in parts.items():
        for stem in stems:
            _link(images[stem], out / part / "images" / images[stem].name)
            _link(masks[stem], out / part / "masks" / masks[stem].name)
    return {part: len(parts[part]) for part in PARTS}


def _make_texts(
    source: Path, out: Path, counts: Mapping[str, int | None], rng: random.Random
) -> dict[str, int]:
    lines = source.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("\t")[::2] for line in lines)
    rows = {" ".join(text.split()): label for label, text in pairs if text.strip()}
    parts = _divide(sorted(rows), counts, rng)
    out.mkdir(parents=True)
    for part, texts in parts.items():
        with (out / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((text, rows[text]) for text in texts)])
    return {part: len(parts[part]) for part in PARTS}


def _divide(
    names: list[str], counts: Mapping[str, int | None], rng: random.Random
) -> dict[str, list[str]]:
    """The names of each part, in random order."""
    rng.shuffle(names)
    parts = {}
    for part, count in counts.items():
        parts[part] = names[: len(names) if count is None else count]
        del names[: len(parts[part])]
    return parts


def _inside(source: Path, *names: str) -> list[Path]:
    """The files of the first of these folders that there is."""
    folder = next((source / name for name in names if (source / name).is_dir()), None)
    if folder is None:
        raise SystemExit(f"{source} has no folder {' or '.join(names)}")
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def _first_of_each(files: Iterable[Path]) -> list[Path]:
    """The files without those whose content an earlier one has."""
    firsts: dict[str, Path] = {}
    for file in files:
        firsts.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
    return list(firsts.values())


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(file.resolve())


# -- what is true of a part


def list_boxes(folder: Path, part: str) -> list[tuple[Path, Boxes]]:
    """Each image of a part with the classes of its objects and their left, top, right, bottom in pixels."""
    name = "val" if part == "valid" else part
    images = {file.stem: file for file in (folder / "JPEGImages").iterdir()}
    return [
        (images[stem], read_objects(folder / "Annotations" / f"{stem}.xml"))
        for stem in (folder / "ImageSets" / "Main" / f"{name}.txt").read_text().split()
    ]


def read_objects(file: Path) -> Boxes:
    """The objects of an XML file. VOC counts pixels from 1 and includes the last one."""
    objects = []
    for element in ElementTree.parse(file).iter("object"):
        left, top, right, bottom = (
            float(element.findtext(f"bndbox/{side}", "0"))
            for side in ("xmin", "ymin", "xmax", "ymax")
        )
        objects.append((element.findtext("name", ""), (left - 1, top - 1, right, bottom)))
    return objects


def list_classes(folder: Path) -> list[str]:
    """The classes of the objects, in the order of the alphabet."""
    files = (folder / "Annotations").glob("*.xml")
    return sorted({name for file in files for name, _ in read_objects(file)})


def list_masks(folder: Path, part: str) -> list[tuple[Path, Path]]:
    """Each image of a part with its mask."""
    masks = {file.stem: file for file in (folder / part / "masks").iterdir()}
    return [(file, masks[file.stem]) for file in sorted((folder / part / "images").iterdir())]


def read_texts(folder: Path, part: str) -> tuple[list[str], list[str]]:
    """The texts of a part and their labels."""
    with (folder / f"{part}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]

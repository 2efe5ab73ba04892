"""The image sets of quality.py, as folders OUT/{train,valid,test}/<class>, drawn anew for each seed.

No test image is like a training image by its making: the sign digits are split by person, since neighbouring files show
one person's hand, once for each digit. The other sets are split at random, in proportion to the classes. CIFAR-10 keeps
its own test part.
"""

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Pools = dict[str, list[Path]]  # class -> its images
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class ImageSet:
    """Where a set comes from, and how many images of each part it has; `None`: all that are left."""

    folder: str
    counts: Mapping[str, int | None]
    by_person: bool = False
    test_folder: str | None = None


SETS = {
    "clothing-500": ImageSet("clothing", {"test": 750, "valid": 250, "train": 500}),
    "signdigits-500": ImageSet(
        "signdigits", {"test": 750, "valid": 250, "train": 500}, by_person=True
    ),
    "cifar10-500": ImageSet(
        "cifar10/train", {"test": 1000, "valid": 250, "train": 500}, test_folder="cifar10/test"
    ),
    "clothing": ImageSet("clothing", {"test": 380, "valid": 340, "train": None}),
    "signdigits": ImageSet(
        "signdigits", {"test": 310, "valid": 310, "train": None}, by_person=True
    ),
    "cifar10-5000": ImageSet(
        "cifar10/train", {"test": 2000, "valid": 1000, "train": 5000}, test_folder="cifar10/test"
    ),
}


def make_set(name: str, data: Path, out: Path, seed: int) -> dict[str, int]:
    """Links the images of a set into OUT/{train,valid,test}/<class>; how many each part has."""
    chosen = SETS[name]
    rng = random.Random(seed)
    pools = read_pools(data / chosen.folder)
    other = read_pools(data / chosen.test_folder) if chosen.test_folder else {}
    shuffle = shuffle_persons if chosen.by_person else shuffle_images
    queue, test_queue = shuffle(pools, rng), shuffle(other, rng)
    sizes = {}
    for part, count in chosen.counts.items():
        source = test_queue if part == "test" and other else queue
        taken = source[: len(source) if count is None else count]
        del source[: len(taken)]
        sizes[part] = len(taken)
        for label, image in taken:
            target = out / part / label / f"{image.parent.name}_{image.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(image.resolve())
    return {part: sizes[part] for part in PARTS}


def read_pools(folder: Path) -> Pools:
    """The images by class, of FOLDER/<class> or of FOLDER/{train,valid,test}/<class> together."""
    pools: Pools = defaultdict(list)
    for image in sorted(folder.rglob("*.jpg")):
        pools[image.parent.name].append(image)
    return dict(pools)


def shuffle_images(pools: Pools, rng: random.Random) -> list[tuple[str, Path]]:
    """All images in an order whose every beginning has the classes in proportion."""
    placed = []
    for label in sorted(pools):
        images = list(pools[label])
        rng.shuffle(images)
        placed += [
            ((number + rng.random()) / len(images), label, image)
            for number, image in enumerate(images)
        ]
    return [(label, image) for _, label, image in sorted(placed)]


def shuffle_persons(pools: Pools, rng: random.Random) -> list[tuple[str, Path]]:
    """All images, those of a person together, the persons in random order.

    In the order of the files' numbers each person signs the digits upwards, mostly from 0 to 9 (IMG_1118 to IMG_1127). So
    a new person begins where the digit does not rise.
    """
    numbered = sorted(
        (int(image.stem.removeprefix("IMG_")), label, image)
        for label, images in pools.items()
        for image in images
    )
    persons: list[list[tuple[str, Path]]] = []
    previous = ""
    for _, label, image in numbered:
        if label <= previous or not persons:
            persons.append([])
        persons[-1].append((label, image))
        previous = label
    rng.shuffle(persons)
    return [labelled for person in persons for labelled in person]

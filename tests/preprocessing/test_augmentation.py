"""The law of augmentation: what is called so shows the net other pixels in other epochs, with targets that follow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.box_files import write_coco, write_voc, write_yolo
from tests.helpers.mask_files import write_images_and_masks
from tuner.config import parsing, yaml_document
from tuner.config.augmentation import POLICIES
from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import Dataset, Source
from tuner.data import coco, digits, masks, synthetic, voc, yolo
from tuner.errors import SpaceError

CANVAS = ImageInputSpec(32, 32, "nearest", (0.0,) * 3, (1.0,) * 3, "letterbox", 32)
EPOCHS = 16
TASKS = {"voc": "detection", "coco": "detection", "yolo": "detection", "masks": "segmentation"}
VIEWS: list[int | str | None] = ["auto", 2, None]
Load = Callable[[Path, ImageOptions], Dataset]
LOADERS: dict[str, Load] = {
    "digits": lambda home, image: digits.load(home, CANVAS, "classification", image=image),
    "synthetic": lambda home, image: synthetic.load(home, CANVAS, "classification", image=image),
    "voc": lambda home, image: voc.load(
        home, CANVAS, "detection", path=str(write_voc(home / "files")), image=image
    ),
    "coco": lambda home, image: coco.load(
        home, CANVAS, "detection", path=str(write_coco(home / "files")), image=image
    ),
    "yolo": lambda home, image: yolo.load(
        home, CANVAS, "detection", path=str(write_yolo(home / "files")), image=image
    ),
    "masks": lambda home, image: masks.load(
        home,
        CANVAS,
        "segmentation",
        path=str(write_images_and_masks(home / "files", 20)),
        image=image,
    ),
}


def leaves(tree: Tensor | dict[str, Tensor]) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else list(tree.values())


def epochs_of(source: Source, count: int = EPOCHS) -> list[list[Tensor]]:
    """Pixels and targets of all examples, as each epoch's view shows them."""
    views = [epoch % source.views if source.views else epoch for epoch in range(count)]
    batches = [source.take(torch.arange(len(source)), view) for view in views]
    return [[*leaves(batch.x), *leaves(batch.y)] for batch in batches]


def augmentations(views: int | str | None) -> list[tuple[str, str]]:
    """Each source with each policy of its task; of endless views and 2 the flip alone, to be quick."""
    return [
        (source, policy)
        for source in LOADERS
        for policy in POLICIES[TASKS.get(source, "classification")]
        if policy == "flip" or (policy != "none" and views == "auto")
    ]


@pytest.mark.parametrize(
    ("name", "augment", "views"),
    [(*pair, views) for views in VIEWS for pair in augmentations(views)],
)
def test_other_epochs_show_other_pixels(
    name: str, augment: str, views: int | str | None, tmp_path: Path
) -> None:
    options = ImageOptions.model_validate(
        {"augment": augment, "views": views, "valid": 0.2, "limit": 20}
    )
    data = LOADERS[name](tmp_path, options)
    for source in (data.train, data.full):
        epochs = epochs_of(source, EPOCHS if augment == "flip" else 4)
        assert not torch.equal(epochs[0][0], epochs[1][0])
        versions = [
            len({epoch[0][row].numpy().tobytes() for epoch in epochs}) for row in range(len(source))
        ]
        assert np.mean(np.array(versions) > 1) > 0.9  # a few images are their own mirror image
        if name in TASKS:  # a class stays the same, boxes and masks do not
            assert any(not torch.equal(a, b) for a, b in zip(*epochs[:2], strict=True))
        if augment != "flip":
            assert source.views == 4 and max(versions) == 4
    assert data.valid.views == data.test.views == 1


def test_what_is_not_augmented_is_the_same_in_every_epoch(tmp_path: Path) -> None:
    for views in (1, 2, "auto", None):
        data = LOADERS["digits"](tmp_path, ImageOptions.model_validate({"views": views}))
        assert data.train.views == 1
        first, *others = epochs_of(data.train)
        assert all(torch.equal(first[0], other[0]) for other in others)


def test_endless_views_mirror_another_random_half_in_each_epoch(tmp_path: Path) -> None:
    options = ImageOptions(augment="flip", views=None)
    source = LOADERS["digits"](tmp_path, options).train
    plain = LOADERS["digits"](tmp_path, ImageOptions()).train.take(torch.arange(len(source)), 0).x
    assert isinstance(plain, Tensor)
    mirrored = np.array([(epoch[0] != plain).any((1, 2, 3)).numpy() for epoch in epochs_of(source)])
    shares = mirrored.mean(1)
    n = len(source)  # four standard errors of a fair coin; a few digits are their own mirror image
    assert (abs(shares - 0.5) < 4 * 0.5 / n**0.5).all()
    agreement = (mirrored[1:] == mirrored[:-1]).mean(1)  # 0: the two halves in turn
    assert (abs(agreement - 0.5) < 4 * 0.5 / n**0.5).all()
    assert len({row.tobytes() for row in mirrored.T}) > n / 2  # and not all images alike


PARTS = "task: classification\nmodel: resnet18_slim\ndata: {name: digits, augment: flip"


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            "views: 1",
            "1 with augment: flip mirrors half of the images for good and shows the same pixels in "
            "every epoch; write 2 (both versions in turn, which can be cached), null (drawn anew in "
            "each epoch), or leave it out",
        ),
        (
            "views: 8",
            "8, but a flip makes only 2 versions of an image, and further ones would be copies; "
            "write 2, or null",
        ),
        (
            "views: {low: 2, high: 4}",
            "4, but a flip makes only 2 versions of an image, and further ones would be copies; "
            "write 2, or null",
        ),
    ],
)
def test_views_that_a_flip_does_not_have_are_refused(written: str, says: str) -> None:
    document = yaml_document.parse_document(f"{PARTS}, {written}}}", "space.yaml")
    with pytest.raises(SpaceError) as error:
        parsing.parse_space(document)
    assert error.value.problems == (f"space.yaml:3: data.views: {says}",)


def test_a_study_of_an_earlier_version_keeps_its_one_view(tmp_path: Path) -> None:
    document = yaml_document.parse_document(f"{PARTS}}}", "space.yaml")
    assert parsing.parse_space(document).sample(None).data.options["views"] == "auto"
    earlier = parsing.with_values(document, {("data", "views"): 1})
    assert earlier.sample(None).data.options["views"] == 1
    source = LOADERS["digits"](tmp_path, ImageOptions(augment="flip", views=1)).train
    assert source.views == 1


@pytest.mark.parametrize("views", ["[1, 2]", "1", "[auto, null]"])
def test_without_a_flip_views_are_as_they_were(views: str) -> None:
    text = f"{PARTS.replace('flip', 'none')}, views: {views}}}"
    parsing.parse_space(yaml_document.parse_document(text, "space.yaml"))

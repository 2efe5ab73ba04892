"""Augmentation policies: every key changes pixels, targets stay on what they describe, and all of it is a function of (row, view)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from tests.helpers.box_files import INK, write_coco
from tests.helpers.mask_files import CLASS_COLOURS, write_images_and_masks
from tuner.config.augmentation import NO_AUGMENTATION, AugmentationPolicy
from tuner.config.data_options import ImageOptions
from tuner.core.geometry import AffineTransform
from tuner.core.input_spec import ImageInputSpec
from tuner.core.subset import Subset
from tuner.core.targets import IGNORED, NO_OBJECT, Boxes, Masks
from tuner.core.types import Dataset, Source
from tuner.data import coco, folder, masks
from tuner.errors import SpaceError
from tuner.preprocessing.image_dataset import ImageSource
from tuner.preprocessing.random_draws import RandomDraws
from tuner.preprocessing.random_operations import (
    OPERATIONS,
    RANDAUGMENT_STRENGTHS,
    apply_operation,
)

CROP = ImageInputSpec(32, 39, "bilinear", (0.0,) * 3, (1.0,) * 3)
LETTERBOX = ImageInputSpec(64, 64, "nearest", (0.0,) * 3, (1.0,) * 3, "letterbox", 32)
EXAMPLES: dict[str, Any] = {
    "flip": True,
    "vertical_flip": True,
    "rotation": 25.0,
    "crop": 0.3,
    "scale": 0.4,
    "colour": 0.5,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.5,
    "hue": 0.3,
    "blur": 2.0,
    "erasing": 0.8,
    "trivialaugment": True,
    "randaugment": {"operations": 3, "magnitude": 20.0},
    "mosaic": 0.7,
    "zoom_out": 2.5,
    "iou_crop": True,
}
BOXES_ALONE = ("mosaic", "zoom_out", "iou_crop")
SIZES = [(50, 40), (41, 63), (40, 40), (90, 33), (37, 52), (64, 47)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of smooth noise, of many sizes: a pixel tells where it is."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(24):
        file = root / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize(SIZES[i % len(SIZES)], Image.Resampling.BICUBIC).save(file)
    return root


def load_classes(home: Path, path: Path, spec: ImageInputSpec = CROP, **keys: Any) -> Dataset:
    options = ImageOptions.model_validate(keys)
    return folder.load(home, spec, "classification", path=str(path), image=options)


def load_boxes(home: Path, **keys: Any) -> Dataset:
    files = home / "files"
    if not files.exists():
        write_coco(files)
    options = ImageOptions.model_validate(keys)
    return coco.load(home, LETTERBOX, "detection", path=str(files), image=options)


def load_masks(home: Path, spec: ImageInputSpec = CROP, **keys: Any) -> Dataset:
    files = home / "masks"
    if not files.exists():
        write_images_and_masks(files, 20, 3)
    options = ImageOptions.model_validate(keys)
    return masks.load(home, spec, "segmentation", path=str(files), image=options)


def pixels_of(source: Source, view: int, index: Tensor | None = None) -> Tensor:
    x = source.take(torch.arange(len(source)) if index is None else index, view).x
    assert isinstance(x, Tensor) and x.dtype == torch.uint8
    return x


def test_every_key_has_an_example() -> None:
    assert set(EXAMPLES) == set(AugmentationPolicy.model_fields)


@pytest.mark.parametrize("key", EXAMPLES)
def test_every_key_changes_pixels_in_every_view_but_the_first(
    key: str, photographs: Path, tmp_path: Path
) -> None:
    keys = {"augment": {key: EXAMPLES[key]}, "views": 4}
    if key == "flip":
        keys["views"] = 2
    if key in BOXES_ALONE:
        source, plain = load_boxes(tmp_path, **keys).train, load_boxes(tmp_path).train
    else:
        source, plain = (load_classes(tmp_path, photographs, **more).train for more in (keys, {}))
    views = [pixels_of(source, view) for view in range(keys["views"])]
    changed = torch.stack([(view != views[0]).flatten(1).any(1) for view in views[1:]])
    assert changed.float().mean() > 0.3  # a flip or a blur concerns half of the images
    if key != "flip":
        assert torch.equal(views[0], pixels_of(plain, 0))
        assert len({view.numpy().tobytes() for view in views}) == 4


@pytest.mark.parametrize("kind", ["classes", "boxes", "masks"])
def test_an_example_is_a_function_of_its_row_and_view_alone(
    kind: str, photographs: Path, tmp_path: Path
) -> None:
    keys = {"augment": "strong"}
    load: Callable[[], Dataset] = {
        "classes": lambda: load_classes(tmp_path, photographs, **keys),
        "boxes": lambda: load_boxes(tmp_path, **keys),
        "masks": lambda: load_masks(tmp_path, **keys),
    }[kind]
    source = load().train
    order = torch.tensor([5, 0, 3, 9])
    state = torch.get_rng_state()
    together = source.take(order, 3)
    torch.manual_seed(99)
    other = load().train
    for i, row in enumerate(order.tolist()):
        alone = other.take(torch.tensor([row]), 3)
        assert (alone.x.int() - together.x[i : i + 1].int()).abs().max() <= 1  # rounding
        for name, tensor in alone.y.items() if isinstance(alone.y, dict) else [("", alone.y)]:
            same = together.y[name] if name else together.y
            assert torch.allclose(tensor.float(), same[i : i + 1].float(), atol=1e-3)
    torch.set_rng_state(state)
    source.take(order, 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("resize", [32, 33, 35, 39, 43, 64])
def test_what_is_judged_is_to_the_pixel_what_it_is_without_augmentation(
    resize: int, photographs: Path, tmp_path: Path
) -> None:
    keys = {"size": 32, "resize": resize}
    plain = load_classes(tmp_path, photographs, **keys)
    augmented = load_classes(tmp_path, photographs, **keys, augment="standard")
    for a, b in ((plain.valid, augmented.valid), (plain.test, augmented.test)):
        assert torch.equal(pixels_of(a, 0), pixels_of(b, 0))
    assert torch.equal(pixels_of(plain.train, 0), pixels_of(augmented.train, 0))


def test_masks_that_are_judged_are_those_without_augmentation(tmp_path: Path) -> None:
    plain, augmented = (load_masks(tmp_path, augment=name) for name in ("none", "standard"))
    for a, b in ((plain.valid, augmented.valid), (plain.train, augmented.train)):
        first, second = (source.take(torch.arange(len(source)), 0) for source in (a, b))
        assert torch.equal(first.x, second.x) and torch.equal(first.y, second.y)


@pytest.mark.parametrize("key", ["operations", "magnitude"])
def test_more_operations_and_a_larger_magnitude_of_randaugment_change_pixels_more(
    key: str, photographs: Path, tmp_path: Path
) -> None:
    plain = load_classes(tmp_path, photographs).train
    changes = []
    for value in {"operations": (1, 4), "magnitude": (3, 20)}[key]:
        keys = {"operations": 2, "magnitude": 9.0} | {key: value}
        source = load_classes(tmp_path, photographs, augment={"randaugment": keys}).train
        distances = (pixels_of(source, v).int() - pixels_of(plain, 0).int() for v in (1, 2, 3))
        changes.append(sum(float(each.abs().float().mean()) for each in distances))
    assert changes[1] > 1.2 * changes[0]


def test_a_crop_reaches_pixels_around_the_centre(photographs: Path, tmp_path: Path) -> None:
    """Of 48 stored pixels 32 are the example: zoomed out, 48 are shown before the border begins."""
    spec = ImageInputSpec(32, 48, "bilinear", (0.0,) * 3, (1.0,) * 3)
    source = load_classes(tmp_path, photographs, spec, augment={"scale": 0.7}).train
    shown = (pixels_of(source, 1) != 114).any(1).flatten(1).float().mean(1)
    assert isinstance(source, Subset) and isinstance(source.whole, ImageSource)
    rows = source.whole.rows[source.rows]
    zoom = RandomDraws(rows, 1).uniform("scale", 0.3, 1.7)[:, 0]
    assert torch.allclose(shown, (zoom * 48 / 32).clamp_max(1) ** 2, atol=0.1)
    assert shown.min() < 0.8


INKS = torch.tensor([INK["blue"], INK["red"]])  # of the labels 0 and 1


def ink_bounds(pixels: Tensor, label: int) -> list[float] | None:
    """The box around the pixels of an image that have a label's colour; None where there are none."""
    distance = (pixels.int() - INKS[label][:, None, None]).abs().amax(0)
    rows, columns = (distance < 90).nonzero(as_tuple=True)
    if not len(rows):
        return None
    return [
        columns.min().item(),
        rows.min().item(),
        columns.max().item() + 1,
        rows.max().item() + 1,
    ]


@pytest.mark.parametrize(
    "augment",
    [
        {"flip": True, "scale": 0.5},
        {"vertical_flip": True, "crop": 0.3},
        {"rotation": 40.0},
        {"zoom_out": 2.0},
        {"iou_crop": True, "flip": True},
        {"iou_crop": True, "zoom_out": 2.0, "scale": 0.3, "rotation": 10.0},
        "light",
        "standard",
    ],
)
def test_boxes_are_where_their_objects_are_drawn(augment: Any, tmp_path: Path) -> None:
    source = load_boxes(tmp_path, augment=augment).train
    compared = dropped = 0
    for view in (1, 2, 3):
        x, y = source.take(torch.arange(len(source)), view)
        assert isinstance(y, dict)
        for image, boxes, labels in zip(x, y["boxes"], y["labels"], strict=True):
            for label in (0, 1):
                drawn = ink_bounds(image, label)
                own = boxes[labels == label]
                if not len(own):
                    dropped += drawn is not None
                    continue
                assert len(own) == 1 and drawn is not None
                # corners of a rotated rectangle are thinner than a pixel's colour
                tolerance = 4.0 if "rotation" in augment else 2.5
                assert np.allclose(own[0].numpy(), drawn, atol=tolerance)
                assert own.min() >= 0 and own.max() <= 64
                compared += 1
    assert compared > 30 and dropped <= compared / 3
    assert len(source.take(torch.tensor([0]), 1).y["labels"]) == 1


def test_an_object_of_which_little_is_left_is_dropped() -> None:
    boxes = torch.tensor([[[0.0, 0, 20, 20], [50, 0, 70, 20], [10, 10, 10.5, 30]]])
    labels = torch.tensor([[0, 1, 2]])
    y = Boxes(boxes, labels, 100).take(torch.tensor([0]))
    shifted = AffineTransform(torch.tensor([[[1.0, 0, 16], [0, 1, 0]]]), 100, 100)
    moved = Boxes(boxes, labels, 100).transform(y, shifted)
    assert isinstance(moved, dict)
    assert moved["labels"].tolist() == [[NO_OBJECT, 1, NO_OBJECT]]  # 20 % is left; too thin
    assert moved["boxes"].tolist() == [[[0, 0, 0, 0], [34, 0, 54, 20], [0, 0, 0, 0]]]


def test_a_mosaic_has_the_objects_of_four_images_where_they_are_drawn(tmp_path: Path) -> None:
    source = load_boxes(tmp_path, augment={"mosaic": 1.0}).train
    plain = source.take(torch.arange(len(source)), 0).y
    assert isinstance(plain, dict)
    x, y = source.take(torch.arange(len(source)), 1)
    assert isinstance(y, dict)
    assert y["labels"].shape[1] == 4 * plain["labels"].shape[1]
    objects = (y["labels"] >= 0).sum(1).float()
    assert objects.mean() > 1.3 * (plain["labels"] >= 0).sum(1).float().mean()
    inside = []
    for image, boxes, labels in zip(x, y["boxes"], y["labels"], strict=True):
        for box, label in zip(boxes[labels >= 0], labels[labels >= 0], strict=True):
            left, top, right, bottom = box.round().int().tolist()
            distance = (image[:, top:bottom, left:right].int() - INKS[label][:, None, None]).abs()
            inside.append((distance.amax(0) < 90).float().mean().item())
    assert np.mean(inside) > 0.85 and min(inside) > 0.5


def test_a_mosaic_of_training_images_shows_no_validation_image(tmp_path: Path) -> None:
    data = load_boxes(tmp_path, augment={"mosaic": 1.0}, valid=0.4)
    rows = data.train.augmenter.partners  # type: ignore[attr-defined]
    assert len(rows) == len(data.train) < len(data.full)


@pytest.mark.parametrize(
    "augment",
    [
        {"flip": True, "scale": 0.5},
        {"rotation": 90.0},
        {"crop": 0.3, "vertical_flip": True},
        "strong",
    ],
)
@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_masks_are_where_their_classes_are_painted(augment: Any, fit: str, tmp_path: Path) -> None:
    spec = ImageInputSpec(32, 39 if fit == "crop" else 32, "nearest", (0.0,) * 3, (1.0,) * 3, fit)
    if augment == "strong":
        augment = {"flip": True, "scale": 0.5, "rotation": 10.0, "erasing": 0.0, "colour": 0.05}
    source = load_masks(tmp_path, spec, augment=augment).train
    x, mask = source.take(torch.arange(len(source)), 1)
    assert isinstance(x, Tensor) and isinstance(mask, Tensor) and mask.dtype == torch.uint8
    colours = torch.tensor(CLASS_COLOURS)
    nearest = (x[:, None].int() - colours[None, :, :, None, None]).abs().sum(2).argmin(1)
    counted = mask != IGNORED
    assert 0.2 < counted.float().mean() <= 1
    agreement = (nearest == mask)[counted].float().mean()
    assert agreement > 0.93  # at the edges bilinear pixels are between two colours
    before = source.take(torch.arange(len(source)), 0).y
    assert not torch.equal(before, mask)


def test_masks_are_moved_exactly_by_whole_pixels() -> None:
    mask = torch.randint(0, 3, (2, 10, 10), dtype=torch.uint8)
    transform = AffineTransform(torch.tensor([[[1.0, 0, 2], [0, 1, 3]]]).repeat(2, 1, 1), 10, 6)
    targets = Masks(None, mask, "")  # type: ignore[arg-type]
    assert torch.equal(targets.transform(mask, transform), mask[:, 3:9, 2:8])


@pytest.mark.parametrize(
    ("shrinking", "allowed"), [(1.0, 128.0), (2.0, 1.0), (3.7, 1.0), (8.0, 1.0)]
)
def test_no_pixel_is_left_out_where_an_image_is_shrunk(shrinking: float, allowed: float) -> None:
    """The mean of a chessboard of single pixels is grey, whatever is sampled of it."""
    board = 255 * (torch.arange(96)[:, None] + torch.arange(96)) % 510
    matrix = torch.tensor([[[shrinking, 0, 0], [0, shrinking, 0]]])
    side = int(96 / shrinking)
    shown = AffineTransform(matrix, 96, side).sample(board[None, None].byte(), "bilinear", 114)
    inner = shown[0, 0, 1 : side - 1, 1 : side - 1]
    assert ((inner - 127.5).abs() <= allowed).all()
    assert shrinking > 1 or (inner - 127.5).abs().min() > 100  # as it was


def test_one_transform_after_another_is_their_product() -> None:
    first = AffineTransform(torch.tensor([[[0.5, 0.1, 3], [0, 0.5, 2]]]), 20, 20)
    later = AffineTransform(torch.tensor([[[2.0, 0, -4], [0.3, 1, 1]]]), 20, 16)
    boxes = torch.tensor([[[2.0, 3, 9, 8]]])
    whole = torch.tensor([[-1e4, -1e4, 1e4, 1e4]])
    both, _ = AffineTransform(first.after(later).matrix, 20, 16, whole).move_boxes(boxes)
    position = torch.tensor([5.0, 6.0, 1.0])
    between = torch.cat([later.matrix[0] @ position, torch.ones(1)])
    assert torch.allclose(first.after(later).matrix[0] @ position, first.matrix[0] @ between)
    assert both.shape == (1, 1, 4)


def test_draws_are_uniform_and_independent() -> None:
    draws = RandomDraws(torch.arange(4000), 1)
    values = draws.uniform("a", count=2)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.std() - 1 / math.sqrt(12)) < 0.01
    others = [draws.uniform("b"), RandomDraws(torch.arange(4000), 2).uniform("a"), values[:, 1:]]
    for other in others:
        both = torch.cat([values[:, :1], other], 1)
        assert abs(torch.corrcoef(both.T)[0, 1]) < 0.06
    counts = torch.bincount(draws.integers("n", 5)[:, 0], minlength=5)
    assert counts.sum() == 4000 and counts.min() > 700


TORCHVISION: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, s: x,
    "brightness": lambda x, s: TF.adjust_brightness(x, 1 + 0.9 * s),
    "saturation": lambda x, s: TF.adjust_saturation(x, 1 + 0.9 * s),
    "contrast": lambda x, s: TF.adjust_contrast(x, 1 + 0.9 * s),
    "sharpness": lambda x, s: TF.adjust_sharpness(x, 1 + 0.9 * s),
    "posterize": lambda x, s: TF.posterize(x, 8 - round(4 * s)),
    "solarize": lambda x, s: TF.solarize(x, 255 * (1 - s)),
    "autocontrast": lambda x, s: TF.autocontrast(x),
    "equalize": lambda x, s: TF.equalize(x),
    "rotate": lambda x, s: TF.rotate(
        x, 30 * s, interpolation=TF.InterpolationMode.BILINEAR, fill=[114.0] * 3
    ),
    "translate_x": lambda x, s: TF.affine(
        x, 0.0, [-round(150 / 331 * 32 * s), 0], 1.0, [0.0, 0.0], fill=[114.0] * 3
    ),
    "translate_y": lambda x, s: TF.affine(
        x, 0.0, [0, -round(150 / 331 * 32 * s)], 1.0, [0.0, 0.0], fill=[114.0] * 3
    ),
    "shear_x": lambda x, s: TF.affine(
        x, 0.0, [0, 0], 1.0, [math.degrees(math.atan(0.3 * s)), 0.0],
        interpolation=TF.InterpolationMode.BILINEAR, fill=[114.0] * 3,
    ),
    "shear_y": lambda x, s: TF.affine(
        x, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(0.3 * s))],
        interpolation=TF.InterpolationMode.BILINEAR, fill=[114.0] * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_those_of_torchvision(operation: str, photographs: Path) -> None:
    pixels = torch.from_numpy(
        np.stack(
            [
                np.asarray(Image.open(file).convert("RGB").resize((32, 32))).transpose(2, 0, 1)
                for file in sorted(photographs.rglob("*.png"))[:6]
            ]
        )
    )
    if operation == "identity":
        return
    strength = 0.5 if not operation.startswith("translate") else 7 / (150 / 331 * 32)
    got = apply_operation(
        operation, pixels.float(), torch.full((len(pixels),), strength), RANDAUGMENT_STRENGTHS
    )
    expected = TORCHVISION[operation](pixels, strength)
    assert not torch.equal(got, pixels.float())
    difference = (got - expected.float()).abs()
    assert (
        difference.mean() < 2
    )  # of 255; where a rotated image ends, borders are blended otherwise
    assert difference.quantile(0.9) <= 1


def test_a_policy_of_another_task_is_refused(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="classification cannot use mosaic: a mosaic of four"):
        load_classes(tmp_path, photographs, augment={"mosaic": 0.5})
    with pytest.raises(SpaceError, match=r"detection cannot use randaugment: .* boxes would stay"):
        load_boxes(tmp_path, augment="randaugment")


def test_views_of_a_policy() -> None:
    assert NO_AUGMENTATION.is_flip_alone is False
    assert AugmentationPolicy(flip=True).is_flip_alone
    assert not AugmentationPolicy(flip=True, hue=0.1).is_flip_alone

"""Sources: augmentation is a function of (index, view), the parts never overlap, digests follow the content."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tuner.config.data_options import ImageOptions
from tuner.core.input_spec import ImageInputSpec
from tuner.core.types import Dataset
from tuner.errors import DataError, SpaceError
from tuner.preprocessing.image_dataset import classification_dataset, resolve_image_spec
from tuner.preprocessing.splits import TEST, TRAIN, UNSPLIT, VALID, Items

WANTED = ImageInputSpec(16, 16, "nearest", (0.5,) * 3, (0.5,) * 3)
N = 60


def items(seed: int = 0, classes: tuple[str, ...] = ("a", "b", "c")) -> Items:
    pictures = list(np.random.default_rng(seed).integers(0, 256, (N, 16, 16, 3), np.uint8))
    return Items(pictures, np.arange(N) % len(classes), classes, np.full(N, UNSPLIT))


def made(home: Path, options: Mapping[str, Any] = {}, listed: Items | None = None) -> Dataset:
    return classification_dataset(home, listed or items(), ImageOptions(**options), WANTED)


def pixels(source: Any, view: int = 0) -> torch.Tensor:
    found = source.take(torch.arange(len(source)), view).x
    assert isinstance(found, torch.Tensor)
    return found


def test_a_batch_is_uint8_channels_first_with_its_labels(tmp_path: Path) -> None:
    listed = items()
    data = made(
        tmp_path,
        listed=Items(
            listed.examples, listed.labels, listed.strata, np.repeat([TRAIN, VALID, TEST], N // 3)
        ),
    )
    x, y = data.train.take(torch.tensor([2, 0]), 0)
    assert isinstance(x, torch.Tensor)
    assert x.dtype == torch.uint8 and x.shape == (2, 3, 16, 16)
    assert torch.equal(
        x[0], torch.from_numpy(np.asarray(listed.examples[2]).copy()).permute(2, 0, 1)
    )
    assert y.tolist() == [2, 0]


def test_parts_never_overlap_and_full_is_train_and_valid(tmp_path: Path) -> None:
    data = made(tmp_path)
    seen = {
        name: {p.numpy().tobytes() for p in pixels(getattr(data, name))}
        for name in ("train", "valid", "test", "full")
    }
    assert not seen["train"] & seen["valid"]
    assert not seen["train"] & seen["test"]
    assert not seen["valid"] & seen["test"]
    assert seen["full"] == seen["train"] | seen["valid"]
    assert len(seen["full"] | seen["test"]) == N


def test_equal_arguments_give_an_equal_batch(tmp_path: Path) -> None:
    first, again = (made(tmp_path / home, {"augment": "flip", "views": 2}).train for home in "ab")
    index = torch.tensor([7, 3, 11])
    batches = [first.take(index, view) for view in (1, 0, 1)]
    assert torch.equal(batches[0].x, batches[2].x)
    assert torch.equal(batches[0].x, again.take(index, 1).x)
    assert torch.equal(
        first.take(index.flip(0), 1).x, batches[0].x.flip(0)
    )  # whatever else is in the batch


def test_with_flip_and_two_views_each_image_is_seen_both_ways(tmp_path: Path) -> None:
    data = made(tmp_path, {"augment": "flip", "views": 2})
    assert data.train.views == 2 and data.full.views == 2
    plain = pixels(made(tmp_path).train)
    one, other = pixels(data.train, 0), pixels(data.train, 1)
    for image, first, second in zip(plain, one, other, strict=True):
        assert {first.numpy().tobytes(), second.numpy().tobytes()} == {
            image.numpy().tobytes(),
            image.flip(2).numpy().tobytes(),
        }
    mirrored = sum(not torch.equal(a, b) for a, b in zip(plain, one, strict=True))
    assert 0.25 * len(plain) < mirrored < 0.75 * len(plain)


def test_what_is_judged_is_not_augmented(tmp_path: Path) -> None:
    data = made(tmp_path, {"augment": "flip", "views": None})
    plain = made(tmp_path)
    assert data.train.views is None
    for name in ("valid", "test"):
        assert getattr(data, name).views == 1
        assert torch.equal(pixels(getattr(data, name), 1), pixels(getattr(plain, name)))


def test_the_digest_of_given_images_never_changes(tmp_path: Path) -> None:
    """A study stores the digest and refuses other data; these values are from before a renaming."""
    images = [np.full((16, 16, 3), i, np.uint8) for i in range(12)]
    split = np.repeat([TRAIN, VALID, TEST], 4)
    data = made(tmp_path, listed=Items(images, np.arange(12) % 2, ("a", "b"), split))
    assert data.digest == "e7e4bd89fdaa7378ffa52efdd4962ef554f465e294c653f30d8f59605f49b47c"
    assert data.train.digest == "8f9365e8a9026b43e424f188412911c260478ffe019b317c1ff34bf723d065c5"
    listed = Items(images, np.arange(12) % 2, ("a", "b"), split)
    for augment in ("flip", {"flip": True}):
        flipped = made(tmp_path, {"augment": augment}, listed=listed)
        assert flipped.digest == "3ec378b805b4752702b2f245ed894a5c64c01f9ae1dbc2a44fdb327cc28845fe"
        assert (
            flipped.train.digest
            == "360cd10405fa3e218b4c61fe1de01001c62bbaf9712da34d92121488914aade4"
        )


def test_the_digest_follows_content_labels_and_split(tmp_path: Path) -> None:
    same = made(tmp_path / "elsewhere").digest
    assert made(tmp_path).digest == same
    swapped = items()
    others = [
        made(tmp_path, {"seed": 1}),
        made(tmp_path, {"augment": "flip"}),
        made(tmp_path, {"augment": "light"}),
        made(tmp_path, {"augment": {"crop": 0.6}}),
        made(tmp_path, {"mean": (0.1, 0.1, 0.1)}),
        made(tmp_path, {"limit": 10}),
        made(tmp_path, listed=items(seed=1)),
        made(tmp_path, listed=items(classes=("a", "b", "x"))),
        made(
            tmp_path,
            listed=Items(
                swapped.examples, swapped.labels[::-1].copy(), swapped.strata, swapped.split
            ),
        ),
    ]
    assert len({same, *(d.digest for d in others)}) == 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ImageInputSpec(224, 256, "bilinear", (0.485,) * 3, (0.229,) * 3)),
        ({"size": 64}, ImageInputSpec(64, 73, "bilinear", (0.485,) * 3, (0.229,) * 3)),
        (
            {"size": 64, "resize": 64, "interpolation": "bicubic"},
            ImageInputSpec(64, 64, "bicubic", (0.485,) * 3, (0.229,) * 3),
        ),
        (
            {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)},
            ImageInputSpec(224, 256, "bilinear", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)),
        ),
    ],
)
def test_the_file_wins_over_the_weights(options: dict[str, Any], expected: ImageInputSpec) -> None:
    assert (
        resolve_image_spec(
            ImageOptions(**options),
            ImageInputSpec(224, 256, "bilinear", (0.485,) * 3, (0.229,) * 3),
        )
        == expected
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 8}, "data.resize: 8, but the crop of 16 must fit into it"),
        ({"std": (1.0, 0.0, 1.0)}, "data.std: 1, 0, 1; each must be above 0"),
    ],
)
def test_impossible_geometry_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError) as error:
        resolve_image_spec(ImageOptions(**options), WANTED)
    assert str(error.value) == message


def test_a_part_whose_only_image_is_unreadable_is_named(tmp_path: Path) -> None:
    listed = items()
    pictures: list[Any] = [*listed.examples]
    pictures[0] = tmp_path / "missing.png"
    part = np.array([VALID] + [TRAIN] * (N - 2) + [TEST])
    with pytest.raises(DataError, match=r"^data: no validation image can be read$"):
        made(
            tmp_path, {"on_bad_image": "skip"}, Items(pictures, listed.labels, listed.strata, part)
        )

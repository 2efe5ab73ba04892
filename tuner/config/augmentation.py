"""Augmentation policies: what `data.augment` may say, and what its names stand for. No torch."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from tuner.config.section import Section

FLIP_VERSIONS = 2  # an image and its mirror image
CACHED_VIEWS = 4  # of a policy with endless versions, where the views are to be cached


class RandAugmentOptions(Section):
    """RandAugment: Cubuk et al., NeurIPS 2020."""

    operations: int = Field(2, ge=1, le=8, description="operations applied one after another")
    magnitude: float = Field(9.0, ge=0, le=30, description="strength of each operation")


class AugmentationPolicy(Section):
    """How training images are changed. Each key at its default changes nothing.

    The keys are applied in the order mosaic, zoom_out, iou_crop, crop, scale, rotation and flips,
    trivialaugment and randaugment, colours, blur, erasing.
    """

    flip: bool = Field(False, description="mirrors half of the images left to right")
    vertical_flip: bool = Field(False, description="mirrors half of the images top to bottom")
    rotation: float = Field(
        0.0, ge=0, le=180, description="largest angle in degrees, in both directions"
    )
    crop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="random resized crop: its smallest share of the image's area; the largest is "
        "1, the aspect ratio 3/4 to 4/3",
    )
    scale: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="zooms by a factor of 1 - scale to 1 + scale, to a random position",
    )
    colour: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest relative change of brightness, contrast and saturation, each, where "
        "they have no key of their own",
    )
    brightness: float | None = Field(
        None, ge=0, le=1, description="largest relative change; null: as colour"
    )
    contrast: float | None = Field(
        None, ge=0, le=1, description="largest relative change; null: as colour"
    )
    saturation: float | None = Field(
        None, ge=0, le=1, description="largest relative change; null: as colour"
    )
    hue: float = Field(
        0.0, ge=0, le=0.5, description="largest change as a share of the colour circle"
    )
    blur: float = Field(
        0.0,
        ge=0,
        le=10,
        description="half of the images are blurred, by a Gaussian whose standard deviation is at "
        "most so many pixels",
    )
    erasing: float = Field(
        0.0, ge=0, le=1, description="share of the images of which a rectangle is erased"
    )
    trivialaugment: bool = Field(
        False, description="one random operation of random strength: TrivialAugment"
    )
    randaugment: bool | RandAugmentOptions = Field(
        False, description="random operations of one strength; true: 2 of magnitude 9"
    )
    mosaic: float = Field(
        0.0, ge=0, le=1, description="share of the images that become a mosaic of four"
    )
    zoom_out: float = Field(
        1.0,
        ge=1,
        le=8,
        description="half of the images are placed on a canvas whose side is up to so many times "
        "larger",
    )
    iou_crop: bool = Field(
        False, description="crops that overlap a box by a random least IoU, as SSD is trained"
    )

    @property
    def randaugment_options(self) -> RandAugmentOptions | None:
        """The options of RandAugment; None where it is off."""
        if isinstance(self.randaugment, RandAugmentOptions):
            return self.randaugment
        return RandAugmentOptions() if self.randaugment else None

    @property
    def is_flip_alone(self) -> bool:
        """Whether there is nothing but the flip, which has FLIP_VERSIONS versions of an image."""
        return self == FLIP_ALONE

    @property
    def needs_surroundings(self) -> bool:
        """Whether pixels around the centre crop can become part of an example."""
        return bool(self.crop is not None or self.scale or self.rotation or self.iou_crop)


NO_AUGMENTATION = AugmentationPolicy()
FLIP_ALONE = AugmentationPolicy(flip=True)
PolicyName = Literal["none", "flip", "light", "standard", "strong", "trivialaugment", "randaugment"]
Augment = PolicyName | AugmentationPolicy
"""What `data.augment` may be."""

_LIGHT = AugmentationPolicy(flip=True, crop=0.7)
_STANDARD = AugmentationPolicy(flip=True, crop=0.35)
POLICIES: Mapping[str, Mapping[str, AugmentationPolicy]] = {
    "classification": {
        "none": NO_AUGMENTATION,
        "flip": FLIP_ALONE,
        "light": _LIGHT,
        "standard": _STANDARD,
        "strong": _STANDARD.model_copy(update={"trivialaugment": True, "erasing": 0.25}),
        "trivialaugment": _STANDARD.model_copy(update={"trivialaugment": True}),
        "randaugment": _STANDARD.model_copy(update={"randaugment": True}),
    },
    "detection": {
        "none": NO_AUGMENTATION,
        "flip": FLIP_ALONE,
        "light": AugmentationPolicy(flip=True, scale=0.25),
        "standard": AugmentationPolicy(flip=True, iou_crop=True, zoom_out=2.0, colour=0.3),
        "strong": AugmentationPolicy(flip=True, mosaic=0.5, scale=0.5, colour=0.4, hue=0.015),
    },
    "instance_segmentation": {
        "none": NO_AUGMENTATION,
        "flip": FLIP_ALONE,
        "light": AugmentationPolicy(flip=True, scale=0.25),
        "standard": AugmentationPolicy(flip=True, iou_crop=True, zoom_out=2.0, colour=0.3),
        "strong": AugmentationPolicy(flip=True, scale=0.5, colour=0.4, hue=0.015),
    },
    "segmentation": {
        "none": NO_AUGMENTATION,
        "flip": FLIP_ALONE,
        "light": AugmentationPolicy(flip=True, scale=0.25),
        "standard": AugmentationPolicy(flip=True, scale=0.5),
        "strong": AugmentationPolicy(flip=True, scale=0.5, rotation=10.0, colour=0.4, blur=1.0),
    },
}
"""What the names stand for, by task."""

_MOVES_PIXELS = "some of its operations move pixels, and {} would stay where they were"
_NEEDS_BOXES = "it is made for images with boxes"
REFUSED_KEYS: Mapping[str, Mapping[str, str]] = {
    "classification": {
        "mosaic": "a mosaic of four images has four classes",
        "zoom_out": f"{_NEEDS_BOXES}; use scale",
        "iou_crop": f"{_NEEDS_BOXES}; use crop",
    },
    "detection": {
        "trivialaugment": _MOVES_PIXELS.format("boxes"),
        "randaugment": _MOVES_PIXELS.format("boxes"),
    },
    "instance_segmentation": {
        "trivialaugment": _MOVES_PIXELS.format("masks"),
        "randaugment": _MOVES_PIXELS.format("masks"),
        "mosaic": "a mosaic of four images has more objects than numbers; use scale",
    },
    "segmentation": {
        "trivialaugment": _MOVES_PIXELS.format("masks"),
        "randaugment": _MOVES_PIXELS.format("masks"),
        "mosaic": f"{_NEEDS_BOXES}; use scale",
        "zoom_out": f"{_NEEDS_BOXES}; use scale",
        "iou_crop": f"{_NEEDS_BOXES}; use crop",
    },
}
"""Why a task cannot use a key of a policy, by task and key."""


def resolve_policy(augment: Augment, task: str) -> AugmentationPolicy:
    """The policy that `data.augment` means for a task.

    Raises:
        ValueError: the task has no policy of this name, or cannot use one of the policy's keys.
    """
    if isinstance(augment, str):
        if augment not in POLICIES[task]:
            raise ValueError(refused_name(augment, task))
        return POLICIES[task][augment]
    for key, reason in REFUSED_KEYS[task].items():
        if getattr(augment, key) != AugmentationPolicy.model_fields[key].default:
            raise ValueError(f"{task} cannot use {key}: {reason}")
    return augment


def may_need_surroundings(augment: Augment) -> bool:
    """Whether the policy needs surroundings, for one of the tasks at least."""
    if isinstance(augment, AugmentationPolicy):
        return augment.needs_surroundings
    named = (policies.get(augment, NO_AUGMENTATION) for policies in POLICIES.values())
    return any(policy.needs_surroundings for policy in named)


def refused_name(name: str, task: str) -> str:
    """Why a task has no policy of this name, and which names it has."""
    reason = REFUSED_KEYS[task].get(name, "there is no such policy")
    return f"{task} cannot use {name}: {reason} (allowed: {', '.join(POLICIES[task])})"


def view_count(policy: AugmentationPolicy, views: int | Literal["auto"] | None) -> int | None:
    """The number of views of images that a policy augments; None: endless.

    Args:
        policy: The policy.
        views: `data.views`; auto: all versions of the flip, CACHED_VIEWS of anything else.
    """
    if policy == NO_AUGMENTATION:
        return 1
    if views == "auto":
        return FLIP_VERSIONS if policy.is_flip_alone else CACHED_VIEWS
    return views
